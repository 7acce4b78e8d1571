"""Give broken files to every loader and every command: one sentence, and nothing changed."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import BertConfig, LlamaConfig

import ardlora_ext as ard
from ardlora_ext.bench.trust.beds import CONFIGS, Block, Tally, build, fingerprint, save_all
from ardlora_ext.bench.trust.mutate import mutated, sealed
from ardlora_ext.checkpoint.check_adapter import check_adapter
from ardlora_ext.checkpoint.reexport import reexport
from ardlora_ext.file_set import write_set
from ardlora_ext.report.run_files import run_files
from ardlora_ext.train.data import load_corpus

_SECONDS = 30  # after which a case counts as hanging


class Loaders:
    """A loader of a broken checkpoint takes it or raises ValueError or OSError, and has then changed nothing."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder, self.tally = folder, tally
        save_all(folder)
        self.files = {name: {p.name: p.read_bytes() for p in (folder / name).iterdir()} for name in CONFIGS}
        self.whole = {name: build(CONFIGS[name]) for name in CONFIGS}  # what is loaded into, until a load is taken
        self.base, self.plain, self.nothing = Block(), Block(), Block()
        self.seen: dict[int, str] = {}  # fingerprints of these

    def case(self, rng: random.Random) -> None:
        """Break one file of one checkpoint and load it."""
        name = rng.choice(sorted(CONFIGS))
        loaders = self._loaders(name)
        what = rng.choice(sorted(loaders))
        starts, load, (model, optimizer) = loaders[what]
        folder, good = self.folder / name, self.files[name]
        path = folder / rng.choice([other for other in sorted(good) if other.startswith(starts)])
        path.write_bytes(mutated(path, rng))
        changed, seal = {path.name}, "ardlora_resume.json" if what == "load_state" else "ardlora_state.json"
        if rng.random() < 0.7 and sealed(folder, seal):
            changed.add(seal)
        before = self.seen.get(id(model)) or fingerprint(model, optimizer)
        outcome = _outcome(lambda: load(folder), (ValueError, OSError))
        self.tally.counts[f"{what} {outcome.partition(':')[0]}"] += 1
        self.tally.check(outcome in ("taken", "refused"), f"{what} of {name}, {path.name}: {outcome}")
        if outcome != "taken":
            self.seen[id(model)] = fingerprint(model, optimizer)
            self.tally.check(self.seen[id(model)] == before, f"{what} of {name}, {path.name}: changed")
        else:
            self.seen.clear()  # random generators too are others now
        if outcome == "taken" and what == "load_state":
            self.whole[name] = build(CONFIGS[name])
        elif outcome == "taken":
            self.base, self.plain = Block(), Block()
        for other in changed:
            (folder / other).write_bytes(good[other])

    def _loaders(self, name: str) -> dict[str, tuple[tuple[str, ...], Callable[[Path], Any], Any]]:
        """Return for each loader the files it reads, a call, and what the call may change."""
        base, plain, (model, optimizer) = self.base, self.plain, self.whole[name]
        config = ard.DoraConfig(r=8) if name == "dora" else ard.ArdConfig(mode="paper", r0=8, granularity="matrix")
        nothing = self.nothing, None
        return {
            "load_state": (("ardlora_resume",), lambda f: ard.load_state(model, optimizer, f), (model, optimizer)),
            "load_pretrained": (("ardlora_state",), lambda f: ard.load_pretrained(base, f), (base, None)),
            "load_peft": (("adapter",), lambda f: ard.load_peft(plain, f, config), (plain, None)),
            "check_adapter": (("adapter", "ardlora_state"), check_adapter, nothing),
            "reexport": (("adapter_config", "ardlora_state"), lambda f: reexport(f, self.folder / "to"), nothing),
        }


class Commands:
    """A command that is given a broken file ends with an exit code and one sentence, never with a traceback."""

    def __init__(self, folder: Path, tally: Tally) -> None:
        self.folder, self.tally, self.good = folder, tally, folder / "good"
        model, _ = build(CONFIGS["ard"], steps=5)
        ard.save_pretrained(model, self.good)
        write_set(self.good, run_files(_METRICS, [{"step": 2, "event": "grow", "module": "up", "unit": 0}] * 3))
        BertConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
            folder / "bert"
        )
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
            folder / "llama"
        )
        texts = {
            "rows.jsonl": "\n".join(f'{{"text": "text {i}", "label": {i % 3}}}' for i in range(40)),
            "rows.csv": "text,text_pair,label\n" + "\n".join(f'"text {i}",pair,{i % 3}' for i in range(40)),
            "rows.txt": "some words of a document. " * 40,
            "options.yaml": "r: 4\nmethod: lora\nlength: 32\ntarget_modules: [query, value]\n",
            "options.json": '{"r": 4, "batch-size": 2, "dtype": "float32", "length": 8, "granularity": null}',
        }
        for name, text in texts.items():
            (folder / name).write_text(text)

    def case(self, rng: random.Random) -> None:
        """Break a file and run a command on it."""
        name, path, call = rng.choice(self._commands(self.folder / "broken", rng))
        outcome = _outcome(call, (SystemExit,) if name != "load_corpus" else (ValueError,))
        self.tally.counts[f"{name} {outcome.partition(':')[0]}"] += 1
        self.tally.check(outcome in ("taken", "refused"), f"{name}, {path}: {outcome}")

    def _commands(self, broken: Path, rng: random.Random) -> list[tuple[str, str, Callable[[], Any]]]:
        shutil.copytree(self.good, broken, dirs_exist_ok=True)
        adapter = rng.choice(("adapter_config.json", "adapter_model.safetensors", "ardlora_state.json"))
        metrics = rng.choice(("metrics.json", "records.jsonl"))
        rows, options = rng.choice(("rows.jsonl", "rows.csv", "rows.txt")), rng.choice(("options.yaml", "options.json"))
        model = rng.choice(("bert", "llama"))
        page = str(self.folder / "page.html")

        def broken_file(source: Path, target: Path) -> None:
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(mutated(source, rng))
            if rng.random() < 0.7:
                sealed(target.parent, target.name)

        def command(source: Path, target: Path, *words: str) -> Callable[[], Any]:
            def call() -> None:
                broken_file(source, target)
                run_command(*words)

            return call

        def data() -> None:
            broken_file(self.folder / rows, broken / rows)
            load_corpus(broken / rows)

        config = self.folder / model / "config.json"
        where, to = str(broken), str(self.folder / "to")
        one = command(self.good / adapter, broken / adapter, "check-adapter", where)
        two = command(self.good / adapter, broken / adapter, "export", where, "--to", to)
        three = command(self.good / metrics, broken / metrics, "report", where, "--to", page)
        four = command(config, broken / "model" / "config.json", "plan", str(broken / "model"), "--length", "8")
        five = command(
            self.folder / options,
            broken / options,
            "plan",
            str(self.folder / "bert"),
            "--config",
            str(broken / options),
        )
        cheap = [("check-adapter", adapter, one), ("export", adapter, two), ("load_corpus", rows, data)]
        return [*cheap, *cheap, *cheap, ("report", metrics, three), ("plan", model, four), ("--config", options, five)]


def run_command(*words: str) -> int:
    """Run a command line in this process, silently."""
    from ardlora_ext import subcommands
    from ardlora_ext.subcommands import Command

    rooms = {"check-adapter": "check_adapter"}
    commands = [Command(words[0], f"ardlora_ext.commands.{rooms.get(words[0], words[0])}", "a command")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return subcommands.run(list(words), "python -m ardlora_ext", "as the user has it", commands)


class _Hangs(BaseException):
    pass


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _outcome(call: Callable[[], Any], expected: tuple[type[BaseException], ...]) -> str:
    """Return `taken`, `refused`, or what else came of a call and from where."""
    try:
        with _alarm():
            call()
    except expected:
        return "refused"
    except _Hangs:
        return f"hangs: after {_SECONDS} s"
    except BaseException as error:
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
        return f"foreign: {type(error).__name__} {str(error)[:100]!r} at {' '.join(places)}"
    return "taken"


_RANKS = {f"encoder.layer.{i}.{name}": [i + 1] for i in range(2) for name in ("query", "output.dense")}
_METRICS: dict[str, Any] = {
    **dict.fromkeys(("model", "data", "command"), "x"),
    **{"method": "ard", "task": "classification", "labels": ["a", "b"], "metric_name": "accuracy"},
    **{name: {"a": 1, "b": [2]} for name in ("config", "settings", "controller", "versions")},
    **dict.fromkeys(("seed", "steps", "batch_size", "train_examples", "test_examples", "params_live"), 4),
    **dict.fromkeys(("params_peak", "params_budget", "params_trainable", "params_total"), 100),
    **dict.fromkeys(("epochs", "metric_before", "metric_after", "loss_before", "loss_after", "seconds"), 0.5),
    **dict.fromkeys(("step_ms_median", "tokens_per_s", "peak_rss_mb"), 2.0),
    "history": [
        {"step": i, "loss": 1.0, "lr": 0.1, "mean_rank": 2, "params_live": 4, "tokens_per_s": 1.0} for i in range(1, 5)
    ],
    "evals": [{"step": i, "loss": 0.5, "metric": 0.5, "examples": 8} for i in (0, 4)],
    "ranks": _RANKS,
    "rank_history": [{"step": i, "params": 100, "ranks": _RANKS} for i in (0, 2, 4)],
}
