"""What the README shows runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

from bench.zoo.models import declare_torchvision_operators, missing

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_and_the_certificate_reads_as_shown(capsys, monkeypatch, tmp_path):
    namespace: dict[str, object] = {}
    example, *rest = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, namespace)
    printed = capsys.readouterr().out.splitlines()
    shown = re.search(r"```\n(mode .*?)```", README, re.DOTALL)[1].splitlines()
    assert len([line for line in example.splitlines() if line]) <= 15
    # The figures are roundings, which differ from one processor to the next; the words do not.
    words = [[re.sub(r"[-+.\de]+", "#", line) for line in lines] for lines in (printed, shown)]
    assert words[0] == words[1]
    if missing("torchvision"):
        rest = [code for code in rest if "torchvision" not in code]
    declare_torchvision_operators()
    monkeypatch.chdir(tmp_path)
    for code in rest:
        exec(code, namespace)
