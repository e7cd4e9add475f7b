"""Makes the pictures of the pages, from a real run and the real commands on a terminal.

    python docs/pictures.py                 all of them, in two minutes
    python docs/pictures.py show timeline   some of them

`examples/pipeline_lm.py` trains in a temporary directory, is killed in the middle of its saves, and
the commands look at what it left.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
HOME = "/home/you"  # what stands in a picture instead of the temporary directory
WIDTH = 112
TRAIN = "examples/pipeline_lm.py --layers 4 --steps-per-epoch 8 --directory runs/lm"
HALF = 8  # of the parts of a checkpoint
COMMANDS = {
    "ls": "ls runs/lm --monitor epoch_loss",
    "show": "show runs/lm/24 --depth 3 --skip opt_state",
    "status": "status runs/lm/32",
    "diff": "diff runs/lm/16 runs/lm/24 --only params.blocks.0 --only params.head",
}


def main(wanted: list[str]) -> None:
    """Makes the pictures of these names; all of them, if none is given."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "examples").symlink_to(ROOT / "examples")
        leave_a_killed_run(Path(home))
        for name in wanted or [*COMMANDS, "timeline"]:
            if name == "timeline":
                draw_timeline(home)
                continue
            text = on_terminal(COMMANDS[name], home)
            picture = draw(name, COMMANDS[name], text.replace(home, HOME))
            (PICTURES / f"{name}.svg").write_text(picture)


def leave_a_killed_run(home: Path) -> None:
    """Trains three epochs, and kills the fourth once half of its last step is saved."""
    train = [sys.executable, *shlex.split(TRAIN)]
    subprocess.run([*train, "--epochs", "3"], cwd=home, check=True)
    process = subprocess.Popen([*train, "--epochs", "4"], cwd=home)
    while len(list(home.glob("runs/lm/32.partial_save/state/part.*/part.json"))) < HALF:
        if process.poll() is not None:
            sys.exit("The run ended before it could be killed: try again.")
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def draw_timeline(home: str) -> None:
    """Has flax-partial draw a checkpoint that was on its way while training went on."""
    command = [sys.executable, "-m", "flax_partial", "timeline", "runs/lm/16", "--out"]
    environment = os.environ | {"MATPLOTLIBRC": str(ROOT / "docs" / "matplotlibrc")}
    picture = PICTURES / "timeline.new.png"
    subprocess.run([*command, picture], cwd=home, env=environment, check=True)
    picture.replace(PICTURES / "timeline.png")


def on_terminal(command: str, home: str) -> str:
    """Returns what a command of flax-partial leaves on a terminal, colours included."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, WIDTH, 0, 0))
    environment = {name: os.environ[name] for name in os.environ if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flax_partial", *shlex.split(command)],
        cwd=home,
        env=environment | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 65536):
            shown += data
    except OSError:  # the command has ended
        pass
    process.wait()
    os.close(master)
    lines = shown.decode().replace("\r\n", "\n")
    return lines.rsplit("\x1b[2K", 1)[-1]  # what a bar leaves, which clears its line


def draw(name: str, command: str, shown: str) -> str:
    """Draws a command and what it said, as an SVG that asks for nothing from elsewhere."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True)
    console.print(Text(f"$ flax-partial {command}", style="bold green"))
    console.print(Text.from_ansi(shown))
    picture = console.export_svg(title="flax-partial", unique_id=name)
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    return picture.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")


if __name__ == "__main__":
    main(sys.argv[1:])
