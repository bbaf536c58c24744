"""Sessions on every backend against transformers, which knows of a row only the tokens that it was fed."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mamba_deploy.bundle import Bundle
from mamba_deploy.contract import Contract, numpy_dtype, to_float32
from mamba_deploy.errors import BundleError, EngineError, InputError, MissingDependencyError
from mamba_deploy.runtime.generate import Statistics
from mamba_deploy.runtime.ort_state import OrtState
from mamba_deploy.runtime.session import Session
from mamba_deploy.runtime.state import Snapshot, State

KINDS = ["mamba", "mamba2"]
# ortvalue: ONNX Runtime, its state as on a GPU but in host memory.
# engine: TensorRT's backend over a GPU that is none
HOWS = ["lowered", "portable", "ortvalue", "torch", "engine"]
VOCAB = 61
# Two float32 computations of one function: unit roundoff 6e-8, some 1,000 roundings one after the other in two layers
# (projections, norms, scan), of random sign: 5 * sqrt(1000) * 6e-8, relative to the largest value.
FLOAT32 = 1e-5

PROMPT = [5, 17, 60, 0, 33, 8, 8, 41, 2, 19, 27]
ROWS = [PROMPT, [7], [1, 2, 3, 4, 5, 6, 59]]

Rows = Sequence[Sequence[int]]
Bundles = Callable[..., Any]  # the factory of conftest.py


COPIES = tempfile.TemporaryDirectory()


@functools.cache
def with_engine(path: Path) -> Bundle:
    """A copy that has an engine: other files of tests use the bundle too."""
    return fake_gpu.give_engine(shutil.copytree(path, tempfile.mkdtemp(dir=COPIES.name), dirs_exist_ok=True))


def opened(path: Path, how: str, **options: Any) -> Session:
    if how == "torch":
        return Session.open(path, "torch", **options)
    if how == "engine":
        bundle = with_engine(path)
        directory = path if bundle.has("tokenizer.json") else None
        return Session(fake_gpu.open_backend(bundle), bundle.config, tokenizer_directory=directory, **options)
    if how == "ortvalue":
        session = Session.open(path, graph="lowered", threads=1, **options)
        contract = session.contract
        session.backend.new_state = lambda batch: OrtState(onnxruntime, contract, batch, "cpu")  # type: ignore[method-assign]
        return session
    return Session.open(path, graph=how, threads=1, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=HOWS)
def how(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def session(bundle: Bundles, kind: str, how: str) -> Iterator[Session]:
    with opened(bundle(kind).path, how) as session:
        yield session


@pytest.fixture
def oracle(bundle: Bundles, kind: str) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    return oracle_of(bundle(kind).theirs)


@pytest.fixture
def mamba2(bundle: Bundles) -> Iterator[Session]:
    """For what does not depend on the model."""
    with opened(bundle("mamba2").path, "lowered") as session:
        yield session


@functools.cache
def oracle_of(theirs: Any) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Logits [V] of transformers after all tokens of a row, read at once and alone."""

    @functools.lru_cache(maxsize=4096)
    def logits(history: tuple[int, ...]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return theirs(torch.tensor([history])).logits[0, -1, :VOCAB].numpy()

    return lambda history: logits(tuple(history))


def assert_logits(found: NDArray, expected: Sequence[NDArray], tolerance: float = FLOAT32) -> None:
    assert found.dtype == np.float32
    assert found.shape == np.shape(expected)
    for row, (got, want) in enumerate(zip(found, expected, strict=True)):
        error = float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())
        assert error < tolerance, f"row {row} is off by {error:.1e}"


def bits(snapshot: Snapshot) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in snapshot.arrays.items()}


def row_bits(snapshot: Snapshot, row: int) -> dict[str, bytes]:
    return {name: array[row].tobytes() for name, array in snapshot.arrays.items()}


# --- reading ------------------------------------------------------------------------------------------------------


FORMS: dict[str, Callable[[list[list[int]]], Any]] = {
    "lists": lambda rows: rows,
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "int32": lambda rows: np.array(rows, np.int32),
    "int64": lambda rows: np.array(rows, np.int64),
    "uint8": lambda rows: np.array(rows, np.uint8),
    "not-contiguous": lambda rows: np.array(rows).T.copy().T,
    "list-of-arrays": lambda rows: [np.array(row) for row in rows],
    "torch": lambda rows: torch.tensor(rows),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_rectangle_of_ids_in_every_form(session: Session, oracle: Any, form: str) -> None:
    rows = [PROMPT, PROMPT[::-1]]
    assert_logits(session.prefill(FORMS[form](rows)), [oracle(row) for row in rows])


def test_rows_of_unequal_length(session: Session, oracle: Any) -> None:
    assert_logits(session.prefill(ROWS), [oracle(row) for row in ROWS])


def test_steps_go_on_from_the_prompt(session: Session, oracle: Any) -> None:
    session.prefill(ROWS)
    histories = [list(row) for row in ROWS]
    for tokens in ([1, 2, 3], np.array([60, 0, 9]), (4, 4, 4)):
        logits = session.step(tokens)
        for history, token in zip(histories, tokens, strict=True):
            history.append(int(token))
        assert_logits(logits, [oracle(history) for history in histories])


def test_steps_alone_are_a_prompt(session: Session, oracle: Any) -> None:
    for t, token in enumerate(PROMPT):
        assert_logits(session.step([token]), [oracle(PROMPT[: t + 1])])


def test_a_second_prompt_goes_on_from_the_first(session: Session, oracle: Any) -> None:
    """Each row is cut at another place."""
    cuts = [3, 1, 0]
    session.prefill([row[:cut] for row, cut in zip(ROWS, cuts, strict=True)])
    rest = [row[cut:] for row, cut in zip(ROWS, cuts, strict=True)]
    logits = session.prefill(rest)
    assert_logits(logits[[0, 2]], [oracle(ROWS[0]), oracle(ROWS[2])])
    assert_logits(session.step([9, 9, 9]), [oracle([*row, 9]) for row in ROWS])


@pytest.mark.parametrize("max_chunk", [1, 2, 4, 11, 12])
def test_prompts_longer_than_a_chunk(bundle: Bundles, kind: str, how: str, oracle: Any, max_chunk: int) -> None:
    with opened(bundle(kind).path, how, max_chunk=max_chunk) as session:
        assert_logits(session.prefill(ROWS), [oracle(row) for row in ROWS])
        assert_logits(session.step([9, 9, 9]), [oracle([*row, 9]) for row in ROWS])


def test_logits_are_the_callers_own(session: Session) -> None:
    """A later call does not write into what an earlier one returned."""
    results = [session.prefill([PROMPT]), session.step([1]), session.step([2]), session.prefill([[3, 4]])]
    copies = [result.copy() for result in results]
    for token in range(5):
        session.step([token])
        session.prefill([[token, token]])
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)


def test_logits_of_a_backend_are_the_callers_own(session: Session) -> None:
    """As its interface promises to whoever calls it without a session."""
    state = session.backend.new_state(1)
    one = np.ones(1, np.int32)
    results = [session.backend.run(np.array([[token]], np.int32), one, state) for token in range(4)]
    copies = [result.copy() for result in results]
    session.backend.run(np.array([[9]], np.int32), one, state)
    session.backend.run(np.array([[8]], np.int32), one, state)
    np.testing.assert_array_equal(results, copies)
    assert len({result.tobytes() for result in results}) == 4


def test_the_callers_ids_are_not_written_to(session: Session) -> None:
    ids = np.array([PROMPT, PROMPT], np.int32)
    session.prefill(ids)
    np.testing.assert_array_equal(ids, [PROMPT, PROMPT])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("max_chunk", [3, 512])
def test_logits_of_all_positions(bundle: Bundles, how: str, max_chunk: int) -> None:
    exported = bundle("mamba2", all_logits=True)
    oracle = oracle_of(exported.theirs)
    with opened(exported.path, how, max_chunk=max_chunk) as session:
        assert session.contract.all_logits
        logits = session.prefill(ROWS, all_positions=True)
        assert logits.shape == (3, len(PROMPT), VOCAB)
        for row, ids in enumerate(ROWS):
            assert_logits(logits[row, : len(ids)], [oracle(ids[: t + 1]) for t in range(len(ids))])
            assert not logits[row, len(ids) :].any(), "past a row's end there are zeros"
        assert_logits(session.step([9, 9, 9]), [oracle([*row, 9]) for row in ROWS])
        session.reset()
        assert_logits(session.prefill(ROWS), [oracle(row) for row in ROWS])


# --- rows ---------------------------------------------------------------------------------------------------------


def test_a_row_without_tokens_keeps_its_state_to_the_bit(session: Session, oracle: Any) -> None:
    session.prefill(ROWS)
    before = session.snapshot()
    session.prefill([[1, 2, 3], [], [4]])
    session.prefill([[1], [], []])
    after = session.snapshot()
    assert row_bits(after, 1) == row_bits(before, 1)
    assert row_bits(after, 0) != row_bits(before, 0)
    assert_logits(
        session.step([5, 6, 7]), [oracle([*ROWS[0], 1, 2, 3, 1, 5]), oracle([7, 6]), oracle([*ROWS[2], 4, 7])]
    )


def test_rows_start_over_while_others_go_on(session: Session, oracle: Any) -> None:
    session.prefill(ROWS)
    before = session.snapshot()
    session.reset(rows=[2, 0])
    after = session.snapshot()
    assert row_bits(after, 1) == row_bits(before, 1)
    assert not any(np.any(array[[0, 2]]) for array in after.arrays.values())
    logits = session.prefill([[9, 8], [], [3]])
    assert_logits(logits[[0, 2]], [oracle([9, 8]), oracle([3])])
    session.reset(rows=1)
    session.reset(rows=[])
    session.reset(rows=np.array([2]))
    session.reset(rows=(row for row in ()))
    assert_logits(session.step([1, 2, 4]), [oracle([9, 8, 1]), oracle([2]), oracle([4])])


def test_reset_forgets_all_and_frees_the_number_of_rows(session: Session, oracle: Any) -> None:
    assert session.batch is None
    session.prefill(ROWS)
    assert session.batch == 3
    session.reset()
    assert session.batch is None
    assert_logits(session.prefill([PROMPT]), [oracle(PROMPT)])
    session.reset()
    session.reset()
    assert_logits(session.step([3, 4]), [oracle([3]), oracle([4])])


# --- snapshots ----------------------------------------------------------------------------------------------------


def test_restore_goes_back(session: Session, oracle: Any) -> None:
    session.prefill(ROWS)
    saved = session.snapshot()
    kept = bits(saved)
    for _ in range(3):  # odd and even numbers of calls: the two buffers of a state change places
        session.step([1, 2, 3])
        session.restore(saved)
        assert_logits(session.step([4, 5, 6]), [oracle([*row, t]) for row, t in zip(ROWS, [4, 5, 6], strict=True)])
    session.reset(rows=[0])
    assert bits(saved) == kept, "a snapshot is a copy"
    assert saved.batch == 3
    session.restore(saved)
    assert bits(session.snapshot()) == kept


def test_a_snapshot_sets_the_number_of_rows(session: Session, oracle: Any) -> None:
    session.prefill(ROWS)
    saved = session.snapshot()
    session.reset()
    session.prefill([[1]])
    session.restore(saved)
    assert session.batch == 3
    assert_logits(session.step([9, 9, 9]), [oracle([*row, 9]) for row in ROWS])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", HOWS)
@pytest.mark.parametrize("target", HOWS)
def test_a_saved_state_goes_on_in_another_session(
    bundle: Bundles, kind: str, source: str, target: str, tmp_path: Path
) -> None:
    exported = bundle(kind)
    oracle = oracle_of(exported.theirs)
    path = tmp_path / "state.safetensors"
    with opened(exported.path, source) as first:
        first.prefill(ROWS)
        first.snapshot().save(path)
    with opened(exported.path, target) as second:
        second.restore(Snapshot.load(path))
        assert_logits(second.step([9, 9, 9]), [oracle([*row, 9]) for row in ROWS])
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


HALVES: dict[str, dict[str, Any]] = {
    "mamba-bf16": {"kind": "mamba", "dtype": "bfloat16"},
    "mamba2-fp16": {"kind": "mamba2", "dtype": "float16"},
    "mamba-fp16-with-its-state": {"kind": "mamba", "dtype": "float16", "state_dtype": "float16"},
    "mamba2-bf16-with-its-state": {"kind": "mamba2", "dtype": "bfloat16", "state_dtype": "bfloat16"},
}
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.mark.parametrize("how", ["lowered", "ortvalue", "torch"])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision_states_keep_their_bits(bundle: Bundles, name: str, how: str, tmp_path: Path) -> None:
    exported = bundle(**HALVES[name])
    states = exported.bundle.contract.states
    path = tmp_path / "state.safetensors"
    with opened(exported.path, how) as session:
        session.prefill(ROWS)
        saved = session.snapshot()
        saved.save(path)
        loaded = Snapshot.load(path)
        assert bits(loaded) == bits(saved)
        assert dict(loaded.dtypes) == dict(saved.dtypes)
        tokens = [9, 9, 9]
        expected = session.step(tokens)
        session.restore(loaded)
        np.testing.assert_array_equal(session.step(tokens), expected)
    tensors = safetensors.torch.load_file(path)  # by the library: true dtypes, true values
    assert list(saved.arrays) == [spec.name for spec in states]
    assert set(tensors) == set(saved.arrays)
    dtypes = {"conv_state": HALVES[name]["dtype"], "ssm_state": HALVES[name].get("state_dtype", "float32")}
    for spec in states:
        assert tensors[spec.name].dtype == getattr(torch, dtypes[spec.name.partition(".")[0]])
        values = to_float32(saved.arrays[spec.name], spec.dtype)
        np.testing.assert_array_equal(tensors[spec.name].float().numpy(), values)
        assert values.any()


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_states_go_on_across_backends(bundle: Bundles, name: str) -> None:
    """One step differs by its roundings: ten values a layer and two in the head, 22 in all, each evenly within u. Four
    standard deviations of their sum are 4 sqrt(22 / 3) u.
    """
    exported = bundle(**HALVES[name])
    tolerance = 4 * np.sqrt(22 / 3) * ROUNDOFF[HALVES[name]["dtype"]]
    with opened(exported.path, "lowered") as ort, opened(exported.path, "torch") as reference:
        for first, second in ((ort, reference), (reference, ort)):
            first.reset()
            first.prefill(ROWS)
            second.restore(first.snapshot())
            assert bits(second.snapshot()) == bits(first.snapshot())
            expected = first.step([9, 9, 9])
            assert_logits(second.step([9, 9, 9]), list(expected), tolerance)


def tiny_snapshot(**changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "conv_state.0": (np.arange(12, dtype=np.uint16).reshape(2, 2, 3), "bfloat16"),
        "ssm_state.0": (np.arange(16, dtype=np.float32).reshape(2, 2, 4), "float32"),
    } | changes
    return Snapshot({n: a for n, (a, _) in values.items()}, {n: d for n, (_, d) in values.items()})


def test_save_overwrites_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"something older")
    tiny_snapshot().save(str(path))
    assert bits(Snapshot.load(str(path))) == bits(tiny_snapshot())
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.safetensors"
    tiny_snapshot().save(path)
    before = path.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_snapshot(**{"conv_state.0": (np.ones((2, 2, 3), np.uint16), "bfloat16")}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def truncated(path: Path) -> None:
    tiny_snapshot().save(path)
    path.write_bytes(path.read_bytes()[:-5])


def foreign(path: Path) -> None:
    """A safetensors file that somebody else wrote: weights, say."""
    safetensors.torch.save_file({"conv_state.0": torch.ones(2, 3)}, path)


def of_a_later_format(path: Path) -> None:
    safetensors.torch.save_file({"conv_state.0": torch.ones(2, 3)}, path, {"format": "mamba-deploy state 2"})


def of_integers(path: Path) -> None:
    metadata = {"format": "mamba-deploy state 1"}
    safetensors.torch.save_file({"conv_state.0": torch.ones(2, 3, dtype=torch.int64)}, path, metadata)


def without_tensors(path: Path) -> None:
    safetensors.torch.save_file({}, path, {"format": "mamba-deploy state 1"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "cannot be read as a saved state"),
    "directory": (lambda path: path.mkdir(), "cannot be read as a saved state"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a saved state"),
    "text": (lambda path: path.write_text("a poem, of some length"), "cannot be read as a saved state"),
    "truncated": (truncated, "cannot be read as a saved state"),
    "foreign": (foreign, "not a saved state"),
    "later-format": (of_a_later_format, "mamba-deploy state 2"),
    "integers": (of_integers, "not a saved state"),
    "no-tensors": (without_tensors, "not a saved state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_no_saved_state_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    make, text = DAMAGE[damage]
    make(path)
    with pytest.raises(InputError, match=text) as caught:
        Snapshot.load(path)
    assert str(path) in str(caught.value)


def changed(snapshot: Snapshot, **changes: tuple[NDArray, str] | None) -> Snapshot:
    """With these tensors replaced, added, or (None) removed."""
    arrays, dtypes = dict(snapshot.arrays), dict(snapshot.dtypes)
    for name, value in changes.items():
        arrays.pop(name, None)
        if value is not None:
            arrays[name], dtypes[name] = value
    return Snapshot(arrays, dtypes)


def without(name: str) -> Callable[[Snapshot], Snapshot]:
    return lambda snapshot: changed(snapshot, **{name: None})


def replaced(name: str, array: Callable[[NDArray], NDArray], dtype: str = "float32") -> Callable[[Snapshot], Snapshot]:
    return lambda snapshot: changed(snapshot, **{name: (array(snapshot.arrays[name]), dtype)})


def each(array: Callable[[NDArray], Any]) -> Callable[[Snapshot], Snapshot]:
    return lambda snapshot: changed(snapshot, **{n: (array(a), "float32") for n, a in snapshot.arrays.items()})


WRONG_STATES: dict[str, tuple[Callable[[Snapshot], Snapshot], str]] = {
    "missing tensor": (without("ssm_state.1"), "ssm_state.1"),
    "tensor too many": (lambda s: changed(s, other=(s.arrays["conv_state.0"], "float32")), "other"),
    "other shape": (replaced("ssm_state.0", lambda a: a[..., :-1]), r"'ssm_state.0' is float32 \[3, 4, 8, 7\]"),
    "other axes": (replaced("conv_state.0", lambda a: a[0, 0]), r"'conv_state.0' is float32 \[3\]"),
    "other dtype": (replaced("conv_state.1", lambda a: a.astype(np.float16), "float16"), "'conv_state.1' is float16"),
    "rows disagree": (replaced("ssm_state.1", lambda a: a[:2]), "ssm_state.1"),
    "no axes": (each(lambda a: np.float32(0)), "no rows"),
    "no rows": (each(lambda a: a[:0]), "no rows"),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_does_not_fit_changes_nothing(mamba2: Session, wrong: str) -> None:
    mamba2.prefill(ROWS)
    before = mamba2.snapshot()
    change, text = WRONG_STATES[wrong]
    with pytest.raises(InputError, match=text):
        mamba2.restore(change(before))
    assert bits(mamba2.snapshot()) == bits(before)


def test_the_state_of_another_model_is_refused(bundle: Bundles) -> None:
    with opened(bundle("mamba").path, "lowered") as one, opened(bundle("mamba2").path, "lowered") as other:
        one.prefill(ROWS)
        other.prefill([[1], [2]])
        before = other.snapshot()
        with pytest.raises(InputError, match=r"'conv_state.0' is float32 \[3, 32, 3\]") as caught:
            other.restore(one.snapshot())
        assert "the model it came from" in caught.value.hint
        assert bits(other.snapshot()) == bits(before)
        assert other.batch == 2


STATES = {"arrays": State, "ortvalue": lambda contract, batch: OrtState(onnxruntime, contract, batch, "cpu")}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_object_refuses_another_number_of_rows(bundle: Bundles, kind: str) -> None:
    contract = bundle("mamba").bundle.contract
    state = STATES[kind](contract, 2)
    with pytest.raises(InputError, match="has 3 rows, this one 2"):
        state.restore(State(contract, 3).snapshot())


def test_an_ortvalue_state_that_cannot_be_written_is_as_it_was(
    bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tensor fails: none has changed."""
    with opened(bundle("mamba2").path, "ortvalue") as session:
        session.prefill(ROWS)
        before = session.snapshot()
        session.prefill(ROWS)
        after, state = session.snapshot(), session._state
        name, real = list(state.spare)[-1], onnxruntime.OrtValue.update_inplace

        def fail(value: Any, data: Any) -> None:
            if value is state.spare[name]:
                raise RuntimeError("no memory")
            real(value, data)

        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime.OrtValue, "update_inplace", fail)
            for call in (lambda: session.restore(before), lambda: session.reset(rows=[0])):
                with pytest.raises(RuntimeError, match="no memory"):
                    call()
        assert bits(session.snapshot()) == bits(after)


def test_there_is_no_snapshot_of_nothing(mamba2: Session) -> None:
    with pytest.raises(InputError, match="nothing was read") as caught:
        mamba2.snapshot()
    assert caught.value.hint == "call prefill first"


# --- failures -----------------------------------------------------------------------------------------------------


def break_after(monkeypatch: pytest.MonkeyPatch, session: Session, calls: int, error: BaseException) -> None:
    """From this call on, the backend computes, writes its outputs, and then fails: the worst moment."""
    backend: Any = session.backend
    buffers = getattr(backend, "buffers", None)
    places = [(backend, part) for part in ("_model", "_session", "_prompt")] + [(buffers, "read_logits")]
    count = [0]

    def fail() -> None:
        count[0] += 1
        if count[0] > calls:
            raise error

    class Breaking:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __call__(self, *arguments: Any) -> Any:  # the PyTorch model; what an engine does last
            result = self.real(*arguments)
            fail()
            return result

        def run_with_iobinding(self, binding: Any) -> None:  # ONNX Runtime
            self.real.run_with_iobinding(binding)
            fail()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    for owner, part in places:
        if hasattr(owner, part):
            monkeypatch.setattr(owner, part, Breaking(getattr(owner, part)))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(("rows", "calls"), [([[1], [], [2]], 0), ([[1, 2], [3], []], 0), (ROWS, 2)])
def test_a_call_that_fails_leaves_the_state_as_it_was(
    session: Session,
    oracle: Any,
    monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
    calls: int,
    error: BaseException,
) -> None:
    """Also when it fails in the third chunk of a prompt."""
    session.prefill(ROWS)
    session.max_chunk = 4
    before = session.snapshot()
    with monkeypatch.context() as patch:
        break_after(patch, session, calls, error)
        with pytest.raises((type(error), EngineError)):
            session.prefill(rows)
    assert bits(session.snapshot()) == bits(before)
    assert_logits(session.step([9, 9, 9]), [oracle([*row, 9]) for row in ROWS])


def test_a_first_call_that_fails_does_not_set_the_number_of_rows(
    mamba2: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_after(patch, mamba2, 0, RuntimeError("out of memory"))
        with pytest.raises(EngineError, match="failed on 2 rows of 3 tokens: out of memory"):
            mamba2.prefill([[1, 2, 3], [4]])
    assert mamba2.batch is None
    assert mamba2.prefill([[1]]).shape == (1, VOCAB)


BAD_IDS: list[tuple[Any, str]] = [
    ([[1, 2], [3, 61, 62], [1]], "row 1 holds token id 61: the vocabulary is 0 to 60"),
    ([[1, 2], [3], [1, -1]], "row 2 holds token id -1: the vocabulary is 0 to 60"),
    ([np.array([2**63], np.uint64), [], []], f"row 0 holds token id {2**63}: the vocabulary is 0 to 60"),
    ([[], [], []], "the prompt is empty: expected at least one token in some row"),
    (np.zeros((3, 0), np.int64), "the prompt is empty: expected at least one token in some row"),
    ([], "no rows were given: expected integers [B, L], or a list of rows"),
    (np.zeros((0, 3), np.int64), "no rows were given: expected integers [B, L], or a list of rows"),
    ([[[1, 2]], [[3, 4]], [[5, 6]]], "row 0 has 2 axes: expected integers [B, L], or a list of rows of integers"),
    ([[1], [[1, 2], [3]], [2]], "row 1 is not a row of integers"),
    ([1, 2, 3], "row 0 has 0 axes: expected integers [B, L], or a list of rows of integers"),
    ([[1], [2.0], [3]], "row 1 holds float64 values: expected integers"),
    ([[1], [True], [3]], "row 1 holds bool values: expected integers"),
    ([[1], ["2"], [3]], "row 1 holds <U1 values: expected integers"),
    ([[1], [None], [3]], "row 1 holds object values: expected integers"),
    ("def", "token ids are str: expected integers [B, L], or a list of rows"),
    (7, "token ids are int: expected integers [B, L], or a list of rows"),
    (np.array(7), "token ids are ndarray: expected integers [B, L], or a list of rows"),
    (None, "token ids are NoneType: expected integers [B, L], or a list of rows"),
    ([[1], [2]], "the batch has 3 rows, and 2 were given"),
    ([[1], [2], [3], [4]], "the batch has 3 rows, and 4 were given"),
]


@pytest.mark.parametrize(("ids", "text"), BAD_IDS, ids=[text for _, text in BAD_IDS])
def test_ids_that_cannot_be_read(mamba2: Session, ids: Any, text: str) -> None:
    mamba2.prefill(ROWS)
    before = mamba2.snapshot()
    with pytest.raises(InputError) as caught:
        mamba2.prefill(ids)
    assert str(caught.value).startswith(text)
    assert bits(mamba2.snapshot()) == bits(before)


BAD_STEPS: list[tuple[Any, str]] = [
    (3, "step takes one token a row, [B] integers; got an array of shape []"),
    ([[1], [2], [3]], "step takes one token a row, [B] integers; got an array of shape [3, 1]"),
    ([[1], [2, 3], [4]], "step takes one token a row, [B] integers"),
    ([1.0, 2.0, 3.0], "row 0 holds float64 values: expected integers"),
    ([1, 2, 61], "row 2 holds token id 61: the vocabulary is 0 to 60"),
    ([], "no rows were given: expected integers [B, L], or a list of rows"),
    ([1, 2], "the batch has 3 rows, and 2 were given"),
]


@pytest.mark.parametrize(("tokens", "text"), BAD_STEPS, ids=[text for _, text in BAD_STEPS])
def test_steps_that_cannot_be_taken(mamba2: Session, tokens: Any, text: str) -> None:
    mamba2.prefill(ROWS)
    before = mamba2.snapshot()
    with pytest.raises(InputError) as caught:
        mamba2.step(tokens)
    assert str(caught.value).startswith(text)
    assert bits(mamba2.snapshot()) == bits(before)


def test_hints_of_the_errors(mamba2: Session) -> None:
    with pytest.raises(InputError) as caught:
        mamba2.prefill([1, 2, 3])
    assert caught.value.hint == "for a single prompt give a list with one row"
    mamba2.prefill(ROWS)
    with pytest.raises(InputError) as caught:
        mamba2.step([1])
    assert "call reset()" in caught.value.hint
    with pytest.raises(InputError) as caught:
        mamba2.prefill(ROWS, all_positions=True)
    assert caught.value.hint == "export it again with --logits all"


BAD_ROWS: list[tuple[Any, str]] = [
    ([0, 3], "there is no row 3: the batch has 3 rows"),
    ([-1], "there is no row -1: the batch has 3 rows"),
    (3, "there is no row 3: the batch has 3 rows"),
    ([0.0], "rows are [0.0]: expected row numbers"),
    ([False, True, False], "rows are [False, True, False]: expected row numbers"),
    (np.array([False, True, False]), "rows are [np.False_, np.True_, np.False_]: expected row numbers"),
    ("12", "rows are ['1', '2']: expected row numbers"),
    (1.5, "rows are [1.5]: expected row numbers"),
]


@pytest.mark.parametrize(("rows", "text"), BAD_ROWS, ids=[repr(rows) for rows, _ in BAD_ROWS])
def test_rows_that_are_not_there(mamba2: Session, rows: Any, text: str) -> None:
    mamba2.prefill(ROWS)
    before = mamba2.snapshot()
    with pytest.raises(InputError) as caught:
        mamba2.reset(rows=rows)
    assert str(caught.value).startswith(text)
    assert bits(mamba2.snapshot()) == bits(before)


def test_there_are_no_rows_before_the_first_call(mamba2: Session) -> None:
    with pytest.raises(InputError, match="there is no row 0: the batch has 0 rows"):
        mamba2.reset(rows=[0])


# --- opening and closing ------------------------------------------------------------------------------------------


def test_a_session_closes_with_its_block(bundle: Bundles, how: str) -> None:
    with opened(bundle("mamba").path, how) as session:
        session.prefill([[1]])
        saved = session.snapshot()
    calls: list[Callable[[], Any]] = [
        lambda: session.prefill([[1]]),
        lambda: session.step([1]),
        lambda: session.restore(saved),
        lambda: session.backend,
        lambda: session.contract,
        lambda: next(session.generate([1], max_tokens=1)),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="the session is closed") as caught:
            call()
        assert caught.value.hint == "open a new one"
    session.close()
    assert session.batch is None


def test_a_session_closes_when_its_block_fails(bundle: Bundles) -> None:
    with pytest.raises(ZeroDivisionError), opened(bundle("mamba").path, "lowered") as session:
        1 / 0  # noqa: B018
    with pytest.raises(EngineError, match="closed"):
        session.prefill([[1]])


def test_what_a_session_says_of_itself(bundle: Bundles, how: str) -> None:
    exported = bundle("mamba")
    with opened(exported.path, how) as session:
        name = {
            "lowered": "(cpu, model.cpu.onnx)",
            "portable": "(cpu, model.onnx)",
            "ortvalue": "(cpu, model.cpu.onnx)",
            "torch": torch.__version__,
            "engine": "TensorRT 99.0",
        }[how]
        assert name in session.backend.name
        assert session.config == exported.bundle.config
        assert isinstance(session.contract, Contract)
        assert session.tokenizer is None


NO_BUNDLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda path: None, "there is no directory"),
    "empty directory": (lambda path: path.mkdir(), "there is no manifest.json in"),
    "file": (lambda path: path.write_text("x"), "there is no manifest.json in"),
}


@pytest.mark.parametrize("case", NO_BUNDLES)
def test_what_is_no_bundle_cannot_be_opened(case: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    NO_BUNDLES[case][0](path)
    for argument in (path, str(path)):
        with pytest.raises(BundleError, match=NO_BUNDLES[case][1]) as caught:
            Session.open(argument)
        assert caught.value.hint == "give a directory that 'mamba-deploy export' wrote"


def test_a_checkpoint_is_no_bundle(bundle: Bundles) -> None:
    with pytest.raises(BundleError, match=r"there is no manifest.json in"):
        Session.open(bundle("mamba").checkpoint)


def test_arguments_of_open(bundle: Bundles) -> None:
    path = bundle("mamba").path
    with pytest.raises(EngineError, match="there is no backend 'cuda'") as caught:
        Session.open(path, "cuda")
    assert "onnxruntime, torch" in caught.value.hint
    with pytest.raises(InputError, match="graph is 'fast'"):
        Session.open(path, graph="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_chunk is 0: expected 1 or more tokens"):
        Session.open(path, max_chunk=0)
    with pytest.raises(InputError, match="provider is 'rocm': expected 'cpu' or 'cuda'"):
        Session.open(path, provider="rocm")  # type: ignore[arg-type]
    for backend in ("torch", "tensorrt", "tensorrt-rtx"):
        with pytest.raises(InputError, match=f"provider 'cuda' is ONNX Runtime's: the backend is '{backend}'"):
            Session.open(path, backend, provider="cuda")


# --- by CUDA, where there is none ---------------------------------------------------------------------------------

CUDA = "CUDAExecutionProvider"
without_cuda = pytest.mark.skipif(
    CUDA in onnxruntime.get_available_providers(), reason="this ONNX Runtime has a CUDA provider"
)


@without_cuda
def test_an_onnx_runtime_for_cpus_cannot_run_by_cuda(bundle: Bundles) -> None:
    version, available = onnxruntime.__version__, ", ".join(onnxruntime.get_available_providers())
    with pytest.raises(EngineError) as caught:
        Session.open(bundle("mamba2").path, provider="cuda")
    assert str(caught.value) == f"ONNX Runtime {version} has no {CUDA} here, only {available}"
    assert "pip install 'mamba-deploy[gpu]'" in caught.value.hint


@pytest.fixture
def built_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """ONNX Runtime says that it was built for CUDA, and makes sessions for the CPU: what it does without a GPU."""
    preloads: list[dict[str, Any]] = []

    def preload(**options: Any) -> None:
        preloads.append(options)
        print("Failed to load libcublas.so.13")  # as the real one does

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    return preloads


@without_cuda
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_session_by_cuda_never_falls_back_to_the_cpu(
    bundle: Bundles, built_for_cuda: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineError, match=f"did not start its {CUDA}: .*libonnxruntime_providers_shared.so") as caught:
        Session.open(bundle("mamba2").path, provider="cuda")
    assert "libraries of CUDA 13.0 and cuDNN" in caught.value.hint
    assert "'onnxruntime-gpu[cuda,cudnn]'" in caught.value.hint
    assert built_for_cuda == [{"cuda": True, "cudnn": True}]
    assert capfd.readouterr().out == ""


@without_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_session_by_cuda_asks_for(
    bundle: Bundles, kind: str, built_for_cuda: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 to its last bit, and a state on the device; a state that finds no room is an error of ours."""
    real, asked = onnxruntime.InferenceSession, []

    def make(path: str, options: Any, *, providers: list[Any], **others: Any) -> Any:
        asked.append(providers)
        session = real(path, options, providers=providers[1:], **others)
        session.get_providers = lambda: [CUDA, "CPUExecutionProvider"]
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    with Session.open(bundle(kind).path, provider="cuda") as session:
        assert asked == [[(CUDA, {"device_id": "0", "use_tf32": "0"}), "CPUExecutionProvider"]]
        assert session.backend.name == f"onnxruntime {onnxruntime.__version__} (cuda, model.cpu.onnx)"
        with pytest.raises(EngineError, match="no room for the state of 2 rows"):
            session.prefill([[1], [2]])
        assert session.batch is None


@pytest.mark.parametrize(
    ("backend", "provider", "module", "extra"),
    [
        ("onnxruntime", "cpu", "onnxruntime", "cpu"),
        ("onnxruntime", "cuda", "onnxruntime", "gpu"),
        ("torch", "cpu", "torch", "export"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_command(
    bundle: Bundles, backend: str, provider: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle("mamba").path
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "mamba_deploy.exporters.reference", raising=False)
    with pytest.raises(MissingDependencyError, match=f"'{module}' is needed") as caught:
        Session.open(path, backend, provider=provider)
    assert caught.value.hint == f"pip install 'mamba-deploy[{extra}]'"


# --- generating ---------------------------------------------------------------------------------------------------


NO_TOKEN = 10**6  # given as the end of a sequence: transformers takes an empty list for "as the checkpoint says"


def greedy_by_transformers(theirs: Any, prompt: Sequence[int], count: int, eos_ids: Sequence[int]) -> list[int]:
    settings = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=list(eos_ids) or [NO_TOKEN], pad_token_id=0
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode():  # with a mask, because transformers would mask the prompt's token 0 as padding
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[0, len(prompt) :].tolist()


def test_greedy_continuation_is_that_of_transformers(bundle: Bundles, kind: str, session: Session) -> None:
    eos_ids = session.config.eos_token_ids
    statistics = Statistics()
    tokens = list(session.generate(ROWS, max_tokens=24, statistics=statistics))
    lengths = []
    for row, prompt in enumerate(ROWS):
        expected = greedy_by_transformers(bundle(kind).theirs, prompt, 24, eos_ids)
        assert [token.id for token in tokens if token.row == row] == expected
        lengths.append(len(expected))
    assert statistics.generated_tokens == len(tokens) == sum(lengths)
    assert statistics.prompt_tokens == sum(map(len, ROWS))
    ends = {token.row: token.finish_reason for token in tokens if token.finish_reason}
    reasons = {row: "eos" if tokens_of(tokens, row)[-1] in eos_ids else "length" for row in range(3)}
    assert ends == reasons


def tokens_of(tokens: Sequence[Any], row: int) -> list[int]:
    return [token.id for token in tokens if token.row == row]


@pytest.mark.parametrize("prompt", [PROMPT, tuple(PROMPT), np.array(PROMPT), [PROMPT], torch.tensor(PROMPT)], ids=type)
def test_a_single_prompt_in_every_form(mamba2: Session, prompt: Any) -> None:
    answer = [token.id for token in mamba2.generate(prompt, max_tokens=5)]
    mamba2.reset()
    logits = mamba2.prefill([PROMPT])
    for token in answer:
        assert token == int(logits[0].argmax())
        logits = mamba2.step([token])


def test_generate_goes_on_from_the_state(mamba2: Session) -> None:
    whole = [token.id for token in mamba2.generate(PROMPT, max_tokens=8)]
    mamba2.reset()
    mamba2.prefill([PROMPT[:4]])
    assert [token.id for token in mamba2.generate(PROMPT[4:], max_tokens=5)] == whole[:5]
    # the state covers all tokens but the last
    assert [token.id for token in mamba2.generate(whole[4:5], max_tokens=3)] == whole[5:]


def test_sampling_is_repeatable_by_its_seed(mamba2: Session) -> None:
    def sample(seed: int) -> list[int]:
        mamba2.reset()
        return [token.id for token in mamba2.generate(PROMPT, max_tokens=20, temperature=1.5, seed=seed)]

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


BAD_PROMPTS: list[tuple[Any, dict[str, Any], str]] = [
    ("def", {}, "the bundle has no tokenizer.json, so a prompt must be token ids"),
    ([[1], "def"], {}, "the bundle has no tokenizer.json, so a prompt must be token ids"),
    ([], {}, "prompts is empty"),
    ([[]], {}, "prompts[0] is empty"),
    ([1, 2.5], {}, "prompts[0][1] is 2.5: expected a token id"),
    ([2.5, 1], {}, "prompts[0] is 2.5: expected a sequence of token ids"),
    (np.array([2.5, 1]), {}, "prompts[0] is 2.5: expected a sequence of token ids"),
    (5, {}, "prompt is 5: expected text, token ids, or a list of either"),
    (None, {}, "prompt is None: expected text, token ids, or a list of either"),
    ([1], {"max_tokens": 0}, "max_tokens is 0"),
    ([1], {"temperature": -1.0}, "temperature is -1.0"),
    ([1], {"temprature": 1.0}, "generate: "),
    ([1], {"stop": ["x"]}, "stop strings need a tokenizer"),
]


@pytest.mark.parametrize(("prompt", "options", "text"), BAD_PROMPTS, ids=[text for *_, text in BAD_PROMPTS])
def test_arguments_of_generate_are_checked_at_once(mamba2: Session, prompt: Any, options: Any, text: str) -> None:
    with pytest.raises(InputError) as caught:
        mamba2.generate(prompt, **options)
    assert str(caught.value).startswith(text)
    assert mamba2.batch is None


def test_an_unknown_sampling_argument_is_named(mamba2: Session) -> None:
    with pytest.raises(InputError, match="temprature"):
        mamba2.generate([1], temprature=1.0)


def test_generate_refuses_ids_out_of_range(mamba2: Session) -> None:
    with pytest.raises(InputError, match="row 0 holds token id 61: the vocabulary is 0 to 60"):
        list(mamba2.generate([1, 61], max_tokens=2))
    assert mamba2.batch is None


# --- any sequence of calls ----------------------------------------------------------------------------------------


class Twin:
    """A session and, by plain Python, the tokens that each of its rows has read."""

    def __init__(self, session: Session, oracle: Callable[[Sequence[int]], NDArray]) -> None:
        self.session = session
        self.oracle = oracle
        self.histories: list[tuple[int, ...]] = []
        self.saved: list[tuple[Snapshot, dict[str, bytes], list[tuple[int, ...]]]] = []

    def read(self, rows: list[list[int]], *, step: bool = False) -> None:
        logits = self.session.step([row[0] for row in rows]) if step else self.session.prefill(rows)
        self.histories = self.histories or [()] * len(rows)
        self.histories = [history + tuple(row) for history, row in zip(self.histories, rows, strict=True)]
        assert logits.shape == (len(rows), VOCAB)
        for b in (b for b, row in enumerate(rows) if row):
            assert_logits(logits[b : b + 1], [self.oracle(self.histories[b])])

    def reset(self, rows: list[int] | None) -> None:
        self.session.reset(rows)
        if rows is None:
            self.histories = []
        for row in rows or ():
            self.histories[row] = ()

    def save(self) -> None:
        snapshot = self.session.snapshot()
        self.saved.append((snapshot, bits(snapshot), list(self.histories)))

    def restore(self, index: int) -> None:
        snapshot, before, histories = self.saved[index]
        assert bits(snapshot) == before, "a snapshot does not change"
        self.session.restore(snapshot)
        self.histories = list(histories)


IDS = st.integers(0, VOCAB - 1)


def play(data: st.DataObject, twin: Twin) -> None:
    batch = len(twin.histories)
    actions = ["prefill", "prefill", "step"]
    if batch:
        actions += ["reset rows", "snapshot", "reset"]
    if twin.saved:
        actions += ["restore", "restore"]
    action = data.draw(st.sampled_from(actions), label="action")
    size = {"min_size": batch or 1, "max_size": batch or 3}
    if action == "prefill":
        rows = st.lists(st.lists(IDS, max_size=7), **size).filter(any)
        twin.read(data.draw(rows, label="rows"))
    elif action == "step":
        twin.read([[token] for token in data.draw(st.lists(IDS, **size), label="tokens")], step=True)
    elif action == "reset rows":
        twin.reset(data.draw(st.lists(st.integers(0, batch - 1), max_size=batch), label="rows"))
    elif action == "reset":
        twin.reset(None)
    elif action == "snapshot":
        twin.save()
    else:
        twin.restore(data.draw(st.integers(0, len(twin.saved) - 1), label="which"))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_sequence_of_calls(session: Session, oracle: Any, data: st.DataObject) -> None:
    """Each from the start, in one session."""
    session.reset()
    session.max_chunk = data.draw(st.sampled_from([1, 2, 3, 512]), label="max_chunk")
    twin = Twin(session, oracle)
    for _ in range(data.draw(st.integers(1, 9), label="calls")):
        play(data, twin)
    if twin.histories:
        twin.read([[1]] * len(twin.histories), step=True)  # shows what each row has read


# --- without PyTorch ----------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import json, sys
from pathlib import Path
blocked = ["torch", "onnx", "onnx_ir", "onnxscript", "transformers", "tokenizers", "huggingface_hub", "matplotlib"]
for name in blocked:
    sys.modules[name] = None  # importing it fails from now on
from mamba_deploy import Session
from mamba_deploy.errors import MissingDependencyError
from mamba_deploy.runtime.state import Snapshot
from mamba_deploy.runtime.verify import Answers, verify

path, state_file = sys.argv[1:]
answer = {}
with Session.open(path, threads=1) as session:
    session.prefill([[5, 6, 7], [8]])
    session.snapshot().save(state_file)
    answer["logits"] = session.step([1, 2]).tolist()
    session.restore(Snapshot.load(state_file))
    answer["again"] = session.step([1, 2]).tolist()
    answer["passed"] = verify(session, Answers.load(Path(path) / "reference.safetensors")).passed
    answer["tokens"] = [token.id for token in session.generate([5, 6, 7], max_tokens=6)]
try:
    Session.open(path, "torch")
except MissingDependencyError as error:
    answer["error"], answer["hint"] = str(error), error.hint
exporting = ("mamba_deploy.exporters.", "mamba_deploy.model", "mamba_deploy.ops", "mamba_deploy.checkpoint")
answer["loaded"] = [name for name in sys.modules if name.startswith(exporting)]
print(json.dumps(answer))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_needs_neither_pytorch_nor_onnx(bundle: Bundles, kind: str, tmp_path: Path) -> None:
    exported = bundle(kind)
    state_file = tmp_path / "state.safetensors"
    command = [sys.executable, "-c", WITHOUT_TORCH, str(exported.path), str(state_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    oracle = oracle_of(exported.theirs)
    assert answer["logits"] == answer["again"]
    assert_logits(np.array(answer["logits"], np.float32), [oracle([5, 6, 7, 1]), oracle([8, 2])])
    assert answer["passed"] is True
    assert answer["tokens"] == greedy_by_transformers(
        exported.theirs, [5, 6, 7], 6, exported.bundle.config.eos_token_ids
    )
    assert "PyTorch" in answer["error"]
    assert answer["hint"] == "pip install 'mamba-deploy[export]'"
    assert answer["loaded"] == []
    assert Snapshot.load(state_file).batch == 2


def test_dtypes_of_snapshots_are_those_of_the_contract(mamba2: Session) -> None:
    mamba2.prefill([[1]])
    saved = mamba2.snapshot()
    for spec in mamba2.contract.states:
        assert saved.dtypes[spec.name] == spec.dtype
        assert saved.arrays[spec.name].dtype == numpy_dtype(spec.dtype)
        assert saved.arrays[spec.name].shape == spec.shape(1)
