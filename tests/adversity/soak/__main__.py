"""`python -m soak`: a plan of faults against a system of its own, and the proof of what is left.

The exit code is the verdict: 0 where nothing is lost, doubled or wrong.
"""

import argparse
import asyncio
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import structlog

from soak.faults import KINDS, Fault, plan
from soak.run import Options, run


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=1, help="of the plan; the same seed, minutes and workers are the same plan"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults are injected")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--devices", type=int, default=60, help="steady ones; others send around the healing of cuts")
    parser.add_argument("--rate", type=float, default=100.0, help="messages of the steady devices a second")
    parser.add_argument(
        "--share",
        type=float,
        default=0.0,
        help="instead of --rate: of what the workers can do, which is measured first",
    )
    parser.add_argument("--faults", type=Path, help="file with faults, as --plan prints them, instead of a plan")
    parser.add_argument("--pace", type=float, default=1.0, help="gaps between faults are divided by it")
    parser.add_argument("--only", default="", help=f"kinds, separated by commas: {', '.join(k.name for k in KINDS)}")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--keep", type=Path, help="directory for data and logs, which stay")
    parser.add_argument(
        "--direct", action="store_true", help="no proxies: for figures of throughput, with faults that need none"
    )
    parser.add_argument("--plan", action="store_true", help="print the plan and do nothing")
    parser.add_argument(
        "--alone", action="store_true", help="each kind once, the next when the one before is recovered from"
    )
    parser.add_argument(
        "--recover", type=float, default=60.0, help="seconds that the last fault may take until it is recovered from"
    )
    given = parser.parse_args()
    only = [name.strip() for name in given.only.split(",") if name.strip()]
    if given.plan:
        for fault in plan(given.seed, given.minutes * 60, given.workers, only, given.pace):
            print(json.dumps(fault.document()))
        return 0
    directory = given.keep or Path(tempfile.mkdtemp(prefix="preservarium-soak-"))
    directory.chmod(0o755) if directory.exists() else directory.mkdir(parents=True)
    options = Options(
        seed=given.seed, seconds=given.minutes * 60, workers=given.workers, devices=given.devices, rate=given.rate,
        share=given.share, proxied=not given.direct, alone=given.alone, recover_s=given.recover, pace=given.pace, only=tuple(only),
    )  # fmt: skip
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    faults = None
    if given.faults:
        faults = [Fault(**json.loads(line)) for line in given.faults.read_text(encoding="utf-8").splitlines() if line]
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    # Ended by whatever started it, it takes its system with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        report = asyncio.run(run(options, directory, say, faults))
    finally:
        if given.keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["result"]["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
