"""``moefoundry doctor``: check this machine before a run. Heavy imports happen when it runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moefoundry.cli.arguments import Number, json_option, local_path
from moefoundry.cli.exits import EXIT_NO


@click.command("doctor")
@click.option(
    "--run-dir", type=local_path, default="runs", metavar="DIR", help="Where runs would write (default: runs)."
)
@click.option(
    "--timeout",
    type=Number(1, 3600),
    default=120.0,
    metavar="SECONDS",
    help="For the all-reduce, with the start of its ranks (default 120).",
)
@json_option
def command(run_dir: Path, timeout: float, as_json: bool) -> int:
    """Check GPUs, driver, NCCL, versions, space, limits and clock, and sum numbers over the ranks of this machine.

    Each line is OK, a warning or an error, with what to do. Exit status 1 says that there are errors.
    """
    from moefoundry.doctor.all_reduce import all_reduce, ranks_here
    from moefoundry.doctor.devices import device_checks
    from moefoundry.doctor.finding import Finding, Status
    from moefoundry.doctor.host import host_checks
    from moefoundry.doctor.versions import version_checks

    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        if not as_json:
            print(finding, flush=True)

    for checks in (version_checks(), host_checks(run_dir), device_checks()):
        for finding in checks:
            tell(finding)
    if not any(finding.name in ("torch", "GPU") and finding.status is Status.error for finding in found):
        tell(all_reduce(ranks_here(), timeout))
    healthy = not any(finding.status is Status.error for finding in found)
    if as_json:
        print(json.dumps({"healthy": healthy, "checks": [finding.to_json() for finding in found]}, indent=2))
    return 0 if healthy else EXIT_NO
