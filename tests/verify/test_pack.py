"""Bundles: a round trip changes nothing, a changed byte is found and named, nothing escapes from a bundle."""

from __future__ import annotations

import copy
import io
import json
import socket
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cli
from harness.records import store
from harness.records.files import StoreError, dumps
from harness.records.public import SWITCH
from harness.verify.exchange import bundle as pack
from tests.support import ROOT

TRACE = '{"step": 1, "loss": 0.5}\n'


def real() -> store.Record:
    """A record of the repository, so that it fits the schema."""
    path = sorted((ROOT / "results" / "fashion-methods").glob("*/record.json"))[0]
    return {key: value for key, value in store.read(path).items() if key != "path"} | {"suite": "smoke"}


REAL = real()


def make(seed: int = 0, lr: float = 0.5, change: Callable[[store.Record], object] = lambda r: None) -> store.Record:
    """A record of another seed or step size, with the id of its cell."""
    record = copy.deepcopy(REAL)
    record["cell"]["seed"], record["cell"]["method"]["parameters"]["lr"] = seed, lr
    record["code"] |= {"dirty": False, "commit": "c" * 40}
    change(record)
    cell = store.cell_of(record)
    return record | {"id": cell.id, "group": cell.group}


def put(results: Path, record: store.Record, attempt: int = 1, **sides: str) -> Path:
    folder = store.Folder(results, record["suite"], record["id"]).attempt(attempt)
    store.write_record(folder, record)
    for name, text in sides.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def bundle(files: dict[str, bytes], listed: dict[str, bytes] | None = None) -> bytes:
    return pack._zip({pack.MANIFEST: pack._manifest(files if listed is None else listed), **files})


def refusal(data: bytes, tmp_path: Path) -> str:
    """What is said of a bundle; nothing of it may have been added."""
    file, into = tmp_path / "evil.zip", tmp_path / "into"
    file.write_bytes(data)
    before = tree(tmp_path)
    with pytest.raises(pack.BundleError) as error:
        pack.merge([file], into)
    assert tree(tmp_path) == before
    return str(error.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a bundle of two records."""
    place = tmp_path_factory.mktemp("sound")
    put(place / "r", make(0), trace_jsonl=TRACE)
    put(place / "r", make(1))
    return pack.pack(place / "r", place / "b.zip").path.read_bytes()


RUNS = st.lists(
    st.tuples(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.booleans(), st.booleans(), st.floats(0, 1)),
    min_size=1, max_size=3, unique_by=lambda run: run[:2],
)  # fmt: skip


@settings(max_examples=10, deadline=None)
@given(RUNS, st.randoms())
def test_packing_and_merging_is_the_identity(runs: list[Any], order: Any) -> None:
    """Byte for byte, and the bundle does not depend on the order in which its records were made."""
    with tempfile.TemporaryDirectory() as place:
        here, again, into = (Path(place) / name for name in ("here", "again", "into"))
        for results in (here, again):
            for seed, lr, trace, environment, accuracy in runs:
                record = make(seed, lr, lambda r, a=accuracy: r["metrics"].update(accuracy=a))  # type: ignore[misc]
                sides = {"trace_jsonl": TRACE} if trace else {}
                sides |= {"env_json": '{"python": "3.11"}'} if environment else {}
                put(results, record, **sides)
                if trace:
                    put(results, record | {"status": "crashed", "reason": "for the test"}, attempt=2)
            order.shuffle(runs)
        packed = pack.pack(here, Path(place) / "a.zip", private=True)
        assert not packed.left_out
        assert pack.pack(again, Path(place) / "b.zip", private=True).path.read_bytes() == packed.path.read_bytes()
        result = pack.merge([packed.path], into)
        assert sorted(result.added) == packed.records and not result.conflicts and not result.refused
        merged = tree(into)
        origins = [name for name in merged if name.endswith("/origin.json")]
        assert len(origins) == len(packed.records)  # beside each record, which stays as it was
        assert {name: data for name, data in merged.items() if name not in origins} == tree(here)
        assert pack.merge([packed.path], into).same == packed.records  # a second time adds nothing


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_changed_byte_is_named_or_changes_nothing(sound: bytes, data: st.DataObject) -> None:
    """Nothing but what was packed ever comes out; where the byte is in a file, the refusal names that file."""
    at = data.draw(st.integers(0, len(sound) - 1))
    changed = bytearray(sound)
    changed[at] ^= data.draw(st.integers(1, 255))
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        inside = [
            (info.filename, info.header_offset + 30 + len(info.filename), info.file_size) for info in archive.infolist()
        ]
        whole = {name: archive.read(name) for name, _, _ in inside if name != pack.MANIFEST}
    with tempfile.TemporaryDirectory() as place:
        file, into = Path(place) / "b.zip", Path(place) / "into"
        file.write_bytes(changed)
        try:
            pack.unpack(file, into)
        except pack.BundleError as error:
            hit = [name for name, start, size in inside if start <= at < start + size]
            assert all(name in str(error) for name in hit)
        else:
            assert tree(into) == whole
            assert not [name for name, start, size in inside if start <= at < start + size]


def test_a_file_changed_with_its_checksum_of_the_zip_is_still_named(tmp_path: Path) -> None:
    """Whoever rewrites the zip file meets the manifest; whoever rewrites that too meets the schema and the id."""
    record = make()
    name = f"smoke/{record['id']}/record.json"
    good = store.encode(record, record["id"])
    same_size = good.replace(b'"seed": 0', b'"seed": 7')
    assert len(same_size) == len(good) and same_size != good
    said = refusal(bundle({name: same_size}, {name: good}), tmp_path)
    assert name in said and "it was changed after it was packed" in said
    said = refusal(bundle({name: same_size}), tmp_path)
    assert name in said and "not that of its cell" in said
    odd = dumps(record | {"metrics": {"accuracy": 2.0, "loss": 0.0}}).encode()
    said = refusal(bundle({name: odd}), tmp_path)
    assert name in said and '"metrics.accuracy": expected float <= 1.0' in said
    more = store.encode(record | {"privacy": {**record["privacy"], "more": 1}}, record["id"])
    said = refusal(bundle({name: more}), tmp_path)
    assert name in said and "privacy.more" in said and "no version of a record" in said


ID = "0123456789ab"
ESCAPES = [
    f"../smoke/{ID}/record.json", f"/smoke/{ID}/record.json", f"smoke/../{ID}/record.json", f"smoke/{ID}/../../x",
    f"smoke/{ID}/record.json/../../../../x", f"smoke\\{ID}\\record.json", f"smoke/{ID}/method.py",
    f"smoke/{ID}/weights.pkl", f"smoke/{ID}/checkpoint/state.pt", f"smoke/{ID}/", f"C:/smoke/{ID}/record.json",
    f"SMOKE/{ID}/record.json", f"smoke/{ID}.1x/record.json", f"smoke/{ID}/\x1b[31mrecord.json", ".bashrc",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_names_that_leave_their_place_are_refused(name: str, sound: bytes, tmp_path: Path) -> None:
    out = io.BytesIO(sound)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(name, "x")
    said = refusal(out.getvalue(), tmp_path)
    assert "not a name that a bundle holds" in said and "\x1b" not in said
    assert name.rstrip("/").rpartition("/")[2].lstrip("\x1b") in said


def test_links_doubles_strays_and_bombs_are_refused(
    sound: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make()
    name, data = f"smoke/{record['id']}/record.json", store.encode(record, record["id"])

    link = zipfile.ZipInfo(name)
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(pack.MANIFEST, pack._manifest({name: b"/etc/passwd"}))
        archive.writestr(link, "/etc/passwd")
    assert f"{name}: not a plain file" in refusal(out.getvalue(), tmp_path)

    out = io.BytesIO(bundle({name: data}))
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(name, data)
    assert f"{name}: there twice" in refusal(out.getvalue(), tmp_path)

    side = f"smoke/{record['id']}/env.json"
    assert f"{side}: not listed in manifest.json" in refusal(bundle({name: data, side: b"{}"}, {name: data}), tmp_path)
    assert f"{side}: listed in manifest.json, but not there" in refusal(
        bundle({name: data}, {name: data, side: b"{}"}), tmp_path
    )
    assert f"{side}: without its record.json" in refusal(bundle({side: b"{}"}), tmp_path)
    assert f"{side}: not JSON" in refusal(bundle({name: data, side: b'{"x": NaN}'}), tmp_path)
    assert f"{side}: not a JSON object" in refusal(bundle({name: data, side: b"[]"}), tmp_path)
    for nothing in (
        b"",
        b"PK",
        b"not a zip file",
        pack._zip({"manifest.json": b"[" * 100_000}),
        pack._zip({name: data}),
    ):
        refusal(nothing, tmp_path)

    monkeypatch.setattr(pack, "MOST_BYTES", 2**20)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:  # a kilobyte that unpacks to two megabytes
        archive.writestr(pack.MANIFEST, pack._manifest({name: data}))
        archive.writestr(name, b" " * 2**21)
    assert f"{name}: larger than 1 MiB" in refusal(out.getvalue(), tmp_path)
    monkeypatch.setattr(pack, "MOST_TOTAL", len(data) + 1)
    other = make(1)
    two = {name: data, f"smoke/{other['id']}/record.json": store.encode(other, other["id"])}
    assert "GiB up to here" in refusal(bundle(two), tmp_path)


def test_what_names_the_sender_or_is_no_record_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host.lab.example")
    kept = put(tmp_path / "r", make(0), env_json='{"cpu": "x", "node": "secret-host"}', trace_jsonl=TRACE)
    (kept / "error.txt").write_text("Traceback: /home/me/x.py")
    (kept / "checkpoint").mkdir()
    reasons = {1: "no such file: /home/me/mnist.npz", 2: r"C:\Users\me\data", 3: "file:///data/x", 4: "on secret-host"}
    for seed, reason in reasons.items():
        put(tmp_path / "r", make(seed) | {"status": "crashed", "reason": reason})
    fine = "at 3 tokens/s, 1/2 of https://example.org/a/b and digits/mlp"
    put(tmp_path / "r", make(5) | {"status": "crashed", "reason": fine})
    broken = tmp_path / "r" / "smoke" / ("e" * 12)
    broken.mkdir()
    (broken / "record.json").write_text("{")
    packed = pack.pack(tmp_path / "r", tmp_path / "b.zip", private=True)
    assert len(packed.records) == 2 and len(packed.left_out) == 6
    said = "\n".join(map(str, packed.left_out))
    assert "$.node holds the name of this machine: 'secret-host'" in said and said.count("absolute path") == 3
    assert "eeeeeeeeeeee/record.json: not JSON" in said
    pack.merge([packed.path], tmp_path / "into")
    assert "trace.jsonl" in {p.name for p in (tmp_path / "into").rglob("*")}
    assert not {"env.json", "error.txt", "checkpoint"} & {p.name for p in (tmp_path / "into").rglob("*")}
    with pytest.raises(StoreError, match="another bundle"):
        put(tmp_path / "r", make(6))
        pack.pack(tmp_path / "r", tmp_path / "b.zip")
    with pytest.raises(StoreError, match="no records that can be packed"):
        pack.pack(tmp_path / "nothing", tmp_path / "c.zip")


def test_the_reasons_that_keep_a_record_from_a_rank(tmp_path: Path) -> None:
    def validated(record: store.Record) -> None:
        record["cell"]["task"]["evaluate"] = "validation"

    code = {"hash": "a" * 12}
    made = {
        "": [make(0), make(1)],
        "missing interval: 1 finished seed": [make(0, 2.0)],
        "unverified: it was made with uncommitted changes": [make(0, 3.0, lambda r: r["code"].update(dirty=True))],
        "unverified: it was made by code whose commit": [make(0, 4.0, lambda r: r["code"].update(commit=None))],
        "unverified: no method": [make(0, 5.0)],
        "stale: it was made by code": [make(0, 6.0, lambda r: r["code"].update(hash="b" * 12))],
        "a search": [make(0, 7.0, validated)],
        "no result: it ended as diverged": [make(0, 8.0) | {"status": "diverged", "reason": "not finite"}],
    }
    codes: dict[str, Any] = {}
    for why, records in made.items():
        for record in records:
            record["code"]["hash"] = "b" * 12 if why.startswith("stale") else "a" * 12
            codes[record["id"]] = "no method is called so" if "no method" in why else code
            put(tmp_path, record)
    found = dict(pack.ineligible(store.load(tmp_path), codes))
    for why, records in made.items():
        for record in records:
            assert found.get(f"smoke/{record['id']}", "").startswith(why) and bool(why) == (
                f"smoke/{record['id']}" in found
            )


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    put(Path("results"), make(0))
    put(Path("results"), make(1, change=lambda r: r["cell"]["method"].update(name="elsewhere")))
    assert cli.main(["pack", "smoke", SWITCH]) == cli.OK and "2 records in smoke.zip" in capsys.readouterr().out
    assert cli.main(["pack", "results/smoke", "-o", "same.zip", SWITCH]) == cli.OK
    assert Path("same.zip").read_bytes() == Path("smoke.zip").read_bytes()
    capsys.readouterr()
    assert cli.main(["merge", "smoke.zip", "--results", "new"]) == cli.OK
    said = capsys.readouterr().out
    assert "2 records added" in said and "2 of them cannot be ranked" in said
    assert 'unverified: its method cannot be built here: no method is called "elsewhere"' in said
    new = {name: data for name, data in tree(Path("new")).items() if not name.endswith("/origin.json")}
    assert new == tree(Path("results"))

    record = next(Path("new").rglob("record.json"))
    record.write_bytes(record.read_bytes().replace(b'"sessions": 1', b'"sessions": 2'))
    assert cli.main(["merge", "smoke.zip", "--results", "new"]) == cli.FAILED
    assert f"conflict: smoke.zip/smoke/{record.parent.name}/record.json: differs from" in capsys.readouterr().out
    Path("smoke.zip").write_bytes(Path("smoke.zip").read_bytes().replace(b'"sessions": 1', b'"sessions": 3'))
    assert cli.main(["merge", "smoke.zip", "--results", "other"]) == cli.USER_ERROR
    assert "record.json: damaged" in capsys.readouterr().err and not Path("other").exists()
    assert cli.main(["pack", "nothing"]) == cli.main(["merge", "nothing.zip"]) == cli.USER_ERROR
    left = json.loads(dumps(make(2) | {"reason": "/home/me", "status": "crashed"}))
    put(Path("results"), left)
    assert cli.main(["pack", "results", "-o", "told.zip"]) == cli.OK  # a reason is private, and this one stays here
    assert cli.main(["pack", "results", "-o", "part.zip", SWITCH]) == cli.FAILED
    assert "left out: results/smoke/" in capsys.readouterr().out
