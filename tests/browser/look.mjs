// node look.mjs PAGE [FOLDER]: what a headless Chromium makes of a page, as JSON.
// With FOLDER, screenshots go there.
import { mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

// The package unpacks its browser into TMPDIR, and with this variable also the libraries and a font.
process.env.AWS_LAMBDA_JS_RUNTIME = "nodejs22.x";
process.env.TMPDIR = join(dirname(fileURLToPath(import.meta.url)), "node_modules", ".browser");
mkdirSync(process.env.TMPDIR, { recursive: true });

const { default: chromium } = await import("@sparticuz/chromium");
const { default: puppeteer } = await import("puppeteer-core");

const [page, folder] = process.argv.slice(2);
const WIDTHS = [1280, 380];

// Runs in the page.
function inspect() {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
    return { rgb: [r, g, b], a };
  };
  const luminance = ({ rgb }) => {
    const [r, g, b] = rgb.map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const found = parse(getComputedStyle(at).backgroundColor);
      if (found.a > 0) return found;
    }
    return { rgb: [255, 255, 255] };
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const box = (node) => {
    const { left, right, top, bottom } = node.getBoundingClientRect();
    return { left, right, top, bottom };
  };
  const texts = [...document.body.querySelectorAll("*")].filter((node) =>
    node.checkVisibility() && !["SCRIPT", "STYLE"].includes(node.tagName) &&
    [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  const drawings = [...document.querySelectorAll(".plot [role=img]")];
  return {
    overflow: document.documentElement.scrollWidth - innerWidth,
    texts: texts.map((node) => {
      const style = getComputedStyle(node);
      const colour = node instanceof SVGElement ? style.fill : style.color;
      return [node.textContent.trim(), contrast(parse(colour), background(node))];
    }),
    plots: Object.fromEntries(drawings.map((node) => [node.id, {
      drawn: node.dataset.drawn,
      width: node.querySelector("svg").clientWidth,
      room: node.parentElement.clientWidth,
      points: node.querySelectorAll(".scatterlayer .point").length,
      bars: node.querySelectorAll(".barlayer .point path").length,
      maps: [...node.querySelectorAll(".heatmaplayer image")].filter(
        (image) => image.getBoundingClientRect().width > 50 && image.href.baseVal).length,
      labels: [...node.querySelectorAll(".annotation-text-g")].map(box),
      marks: [...node.querySelectorAll(".scatterlayer .point")].map(box),
    }])),
  };
}

// Runs in the page: the first cells of the table's rows after clicks on a column's heading.
function sortBy(column, clicks) {
  const heading = document.querySelectorAll("thead button")[column];
  for (let click = 0; click < clicks; click++) heading.click();
  return [...document.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
}

const drawn = (tab, scheme) => tab.waitForFunction(
  (name) => [...document.querySelectorAll(".plot [role=img]")].every(
    (node) => node.dataset.drawn === name),
  { timeout: 20000 }, scheme);

const settled = (tab) => tab.waitForFunction(
  () => [...document.querySelectorAll(".plot [role=img]")].every(
    (node) => node.querySelector("svg").clientWidth === node.parentElement.clientWidth),
  { timeout: 20000 });

const setScheme = (tab, value) =>
  tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value }]);

const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(),
  headless: "shell",
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
try {
  const tab = await browser.newPage();
  const complaints = [];
  const requests = [];
  tab.on("console", (message) => complaints.push(`${message.type()}: ${message.text()}`));
  tab.on("pageerror", (error) => complaints.push(error.message));
  tab.on("request", (request) => requests.push(request.url().slice(0, 80)));
  await setScheme(tab, "light");
  await tab.setViewport({ width: WIDTHS[0], height: 900 });
  await tab.goto(pathToFileURL(page).href);
  const looks = [];
  // One page throughout: it must follow its reader's scheme and width.
  for (const scheme of ["light", "dark"]) {
    for (const width of WIDTHS) {
      await setScheme(tab, scheme);
      await tab.setViewport({ width, height: 900 });
      await drawn(tab, scheme);
      await settled(tab);
      looks.push({ scheme, width, ...(await tab.evaluate(inspect)) });
      if (folder) {
        await tab.screenshot({ path: join(folder, `${scheme}-${width}.png`), fullPage: true });
      }
    }
  }
  const sorted = { up: await tab.evaluate(sortBy, 1, 1), down: await tab.evaluate(sortBy, 1, 1) };
  console.log(JSON.stringify({ complaints, requests, looks, sorted }));
} finally {
  await browser.close();
}
