"""What a plan takes on machines that are not here."""

from __future__ import annotations

from carnice_build.commands.collector import no_collections
from carnice_build.commands.options import Options
from carnice_build.commands.plan import PlanResult
from carnice_build.errors import RecipeError
from carnice_build.planning.estimate import Estimate, Machines, estimate
from carnice_build.remote.config import read_rates
from carnice_build.units import parse_bandwidth

_MOST = 1e12


def machines_of(
    nodes: int | None, bandwidth: str | None, price: float | None, options: Options
) -> Machines:
    """The machines that the arguments mean; RecipeError for what cannot be.

    Each has as many cores as the options say that there are jobs.
    """
    if bandwidth is None:
        raise RecipeError(
            "an estimate needs the bandwidth of a node",
            where="--price" if nodes is None else "--nodes",
            expected="--bandwidth with it, such as --bandwidth 10Gbit/s",
        )
    try:
        rate = parse_bandwidth(bandwidth)
    except ValueError as error:
        raise RecipeError(str(error), where="--bandwidth") from None
    if price is not None and not 0 <= price <= _MOST:
        raise RecipeError(f"{price} is no price", where="--price", expected=f"0 to {_MOST:g}")
    return Machines(nodes or 1, options.jobs, rate, read_rates(options.recipes), price)


@no_collections()
def estimate_plan(result: PlanResult, machines: Machines) -> Estimate:
    """What each of `machines` takes for what is still to do of a plan, divided as parts are."""
    plan, status = result.plan, result.status
    shares = []
    if machines.count > 1:
        from carnice_build.execute.parts import divide

        shares = [share.members for share in divide(machines.count, plan.variants, plan.graph)]
    return estimate(status, plan.graph, shares, machines)
