"""What `epsbench show` says of a record."""

from __future__ import annotations

import pytest

from harness import cli


def said(capsys: pytest.CaptureFixture[str], *request: str) -> str:
    assert cli.main(request) == cli.OK
    return " ".join(capsys.readouterr().out.split())
