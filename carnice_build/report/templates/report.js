"use strict";
{
  const { figures, templates } = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  const overlaps = (a, b) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

  // The first place around a point, near before far, where its name covers nothing.
  function place(point, width, frame, taken) {
    const height = 16;
    for (const distance of [16, 30, 46, 64]) {
      for (const [dx, dy] of [[1, 0], [0, -1], [0, 1], [-1, 0], [1, -1], [1, 1], [-1, -1], [-1, 1]]) {
        const x = point.x + dx * (distance + width / 2 - (dy ? width / 2.5 : 0));
        const y = point.y + dy * distance;
        const box = {
          left: x - width / 2, right: x + width / 2, top: y - height / 2, bottom: y + height / 2,
        };
        const inside = box.left >= frame.left && box.right <= frame.right &&
          box.top >= frame.top && box.bottom <= frame.bottom;
        if (inside && !taken.some((other) => overlaps(box, other))) return { box, x, y };
      }
    }
    return null;
  }

  // Names that find no place are left to the hover box and the table.
  function nameLabels(div) {
    const frame = div.querySelector(".nsewdrag").getBoundingClientRect();
    const context = document.createElement("canvas").getContext("2d");
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    // A trace without points is not drawn.
    const points = div.data.filter((trace) => trace.x.length).flatMap((trace, index) => {
      const marks = div.querySelectorAll(".scatterlayer .trace")[index].querySelectorAll(".point");
      return trace.text.map((text, number) => {
        const box = marks[number].getBoundingClientRect();
        return { text, x: (box.left + box.right) / 2, y: (box.top + box.bottom) / 2,
          data: [trace.x[number], trace.y[number]] };
      });
    });
    const taken = points.map(({ x, y }) =>
      ({ left: x - 8, right: x + 8, top: y - 8, bottom: y + 8 }));
    taken.push(...[...div.querySelectorAll(".annotation-text-g")]
      .map((node) => node.getBoundingClientRect()));
    return points.flatMap((point) => {
      const found = place(point, context.measureText(point.text).width + 6, frame, taken);
      if (!found) return [];
      taken.push(found.box);
      return [{
        x: point.data[0], y: point.data[1], text: point.text, font: { size: 12 },
        showarrow: true, arrowhead: 0, arrowwidth: 1, standoff: 7, borderpad: 0,
        ax: found.x - point.x, ay: found.y - point.y, name: "label",
      }];
    });
  }

  async function draw(div) {
    const { data, layout, labels } = figures[div.id];
    const template = templates[dark.matches ? "dark" : "light"];
    await Plotly.react(div, data, { ...layout, template }, config);
    if (labels) {
      const annotations = [...(layout.annotations || []), ...nameLabels(div)];
      await Plotly.relayout(div, { annotations });
    }
    div.dataset.drawn = dark.matches ? "dark" : "light";
  }

  const divs = [...document.querySelectorAll(".plot [role=img]")];
  const drawAll = () => Promise.all(divs.map(draw));
  drawAll();
  dark.addEventListener("change", drawAll);
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => divs.filter((div) => figures[div.id].labels).forEach(draw), 200);
  });

  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const up = head.getAttribute("aria-sort") !== "ascending";
      const body = head.closest("table").tBodies[0];
      const value = (row) => row.cells[head.cellIndex].dataset.value;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      // Cells without a figure stay last, whichever way.
      body.append(...[...body.rows].sort((a, b) =>
        (value(a) === "") - (value(b) === "") ||
        (up ? 1 : -1) * compare(value(a), value(b))));
    });
  }
}
