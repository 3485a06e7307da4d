"""Hadal's router beside sglang-router, both before instant workers, in one run: prints the table of router.md.

    cargo build --profile dist -p router --bin router --example versus
    python -m venv /tmp/peer && /tmp/peer/bin/pip install --no-deps sglang-router==0.3.2
    /tmp/peer/bin/pip install setproctitle aiohttp orjson uvicorn fastapi
    sudo python docs/benchmarks/router.py --peer /tmp/peer/bin/python [--pin] [--quickack] [--rounds 3] [--seconds 1.5]

Runs in a network namespace of its own (hence root): the peer tries to fetch a tokenizer from a public hub otherwise.
With --pin the router has core 1 for itself and everything else core 0. With --quickack the namespace acknowledges at
once, which hides that the peer does not set TCP_NODELAY towards its clients.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "dist"
PEER_PORT = 18101


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True, help="Python that has sglang-router 0.3.2")
    parser.add_argument("--pin", action="store_true")
    parser.add_argument("--quickack", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--connections", type=int, nargs="*", default=[1, 8, 64])
    return parser.parse_args()


def isolate(args):
    """Starts this script again inside a namespace where only loopback exists."""
    if os.environ.get("VERSUS_INSIDE"):
        return
    lines = ["ip link set lo up"]
    if args.quickack:
        # Both routes are there, and both must say so.
        for net in ("127.0.0.0/8", "127.0.0.1"):
            lines.append(f"ip route change table local local {net} dev lo quickack 1")
    lines.append('exec "$@"')
    env = {**os.environ, "VERSUS_INSIDE": "1"}
    inner = ["unshare", "-n", "sh", "-ec", "\n".join(lines), "sh", sys.executable, *sys.argv]
    sys.exit(subprocess.run(inner, env=env, check=False).returncode)


def core(args, number):
    return ["taskset", "-c", str(number)] if args.pin else []


def start(command, **more):
    return subprocess.Popen(command, text=True, **more)


def wait(url):
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def load(args, address, connections, stream, pid=None):
    command = [*core(args, 0), str(TARGET / "examples/versus"), "load", "--address", address]
    command += ["--connections", str(connections), "--seconds", str(args.seconds)]
    command += ["--stream"] if stream else []
    command += ["--pid", str(pid)] if pid else []
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    args = arguments()
    isolate(args)
    children = []
    try:
        workers = start([*core(args, 0), str(TARGET / "examples/versus"), "workers"], stdout=subprocess.PIPE)
        children.append(workers)
        at = json.loads(workers.stdout.readline())
        hadal = [*core(args, 1), str(TARGET / "router"), "--model", str(ROOT / "crates/text/tests/fixtures")]
        hadal += ["--served-name", "m", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--log", "warn"]
        hadal += ["--workers", f"{at['prefill']},{at['decode']}"]
        hadal = start(hadal, stdout=subprocess.PIPE)
        children.append(hadal)
        hadal_at = json.loads(hadal.stdout.readline())["addresses"]["http"]
        peer = [*core(args, 1), args.peer, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
        peer += ["--port", str(PEER_PORT), "--prometheus-host", "127.0.0.1", "--prometheus-port", "18191"]
        peer += ["--log-level", "warn", "--worker-startup-check-interval", "1", "--policy", "round_robin"]
        peer += ["--pd-disaggregation", "--prefill", f"http://{at['http_prefill']}", "9000"]
        peer += ["--decode", f"http://{at['http_decode']}"]
        peer = start(peer, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        children.append(peer)
        wait(f"http://{hadal_at}/ready")
        wait(f"http://127.0.0.1:{PEER_PORT}/health")
        time.sleep(2)
        report(args, at["http_decode"], {"hadal": (hadal_at, hadal.pid), "peer": (f"127.0.0.1:{PEER_PORT}", peer.pid)})
    finally:
        for child in children:
            child.kill()


def report(args, direct_at, routers):
    print("| answer | connections | router | requests/s | added p50, us | added p99, us | added TTFT p50, us | CPU a request, us | RSS, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for stream in (False, True):
        for connections in args.connections:
            rounds = {"direct": [], **{name: [] for name in routers}}
            for _ in range(args.rounds):
                rounds["direct"].append(load(args, direct_at, connections, stream))
                for name, (address, pid) in routers.items():
                    rounds[name].append(load(args, address, connections, stream, pid))
            median = lambda name, key: statistics.median(one[key] for one in rounds[name])
            kind = "stream" if stream else "whole"
            for name in rounds:
                added = lambda key: f"{median(name, key) - median('direct', key):+.0f}"
                if name == "direct":
                    row = [f"({median(name, key):.0f})" for key in ("p50_us", "p99_us", "ttft50_us")] + ["", ""]
                else:
                    row = [added("p50_us"), added("p99_us"), added("ttft50_us")]
                    row += [f"{median(name, 'cpu_us'):.0f}", f"{median(name, 'rss_mib'):.0f}"]
                print(f"| {kind} | {connections} | {name} | {median(name, 'rps'):.0f} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
