"""Stands in for ``llada fit``: ``fake_fit.py STUDY --mode=M --name=N``. Its run's folder is STUDY/N.

It notes its start in STUDY/started and then, by its mode: ``ok`` leaves a finished result; ``fail`` ends with an
error; ``killed`` ends by a signal; ``silent`` ends well without a result; ``stop`` stops whoever started it, and saves
when it is asked to leave; ``deaf`` does the same and does not leave, nor does its child.
"""

import json
import os
import signal
import sys

study = sys.argv[1]
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[2:])
mode, name = options["mode"], options["name"]
folder = os.path.join(study, name)
os.makedirs(folder, exist_ok=True)
with open(os.path.join(study, "started"), "a") as started:
    started.write(f"{name} {os.environ['LLADA_CORES']} {os.environ.get('OMP_NUM_THREADS')}\n")


def save(*_):
    with open(os.path.join(folder, "saved"), "w"):
        sys.exit(0)


if mode == "ok":
    with open(os.path.join(folder, "result.json"), "w") as file:
        json.dump([{"run": name, "steps": 1, "status": "done"}], file)
elif mode == "fail":
    sys.exit("\x1b[31merror: lr: -1 is below 0\x1b[0m\n\n")
elif mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif mode in ("stop", "deaf"):
    signal.signal(signal.SIGTERM, save if mode == "stop" else signal.SIG_IGN)
    if mode == "deaf":
        os.fork()
    os.kill(int(options["parent"]), signal.SIGTERM)
    while True:
        signal.pause()
