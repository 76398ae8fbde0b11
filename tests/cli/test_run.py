"""`dsv4 run` over a small random model: what goes where, the JSON document, limits, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_engine.sampling import Sampling
from dsv4cli.answering import How, Outcome, closing_lines

from .conftest import CTX, Cli, environment

TINY_ANSWER = ["--max-tokens", "12", "--seed", "3"]


def test_answer_on_stdout_and_the_rest_on_stderr(cli: Cli, model: Path, note: Path) -> None:
    done = cli("run", "What is the code?", "--file", note, "--model", model, *TINY_ANSWER)
    assert done.code == 0
    # The answer and nothing else: a model with random weights may itself write any byte.
    answer = cli("run", "What is the code?", "--file", note, "--model", model, "--json", *TINY_ANSWER).json["text"]
    assert done.out.rstrip("\n") == answer.rstrip("\n") and done.out.endswith("\n")
    assert "\x1b" not in done.err
    assert "12 out" in done.err
    assert "the limit of 12 tokens ran out in the middle of the answer; raise --max-tokens" in done.err


def test_json_is_one_document_of_the_promised_shape(cli: Cli, model: Path, note: Path) -> None:
    done = cli("run", "What is the code?", "--file", note, "--model", model, "--json", *TINY_ANSWER)
    assert done.code == 0
    found = done.json
    assert list(found) == [
        "text", "reasoning", "finish_reason", "usage", "timing", "model", "device", "seed",
    ]  # fmt: skip
    assert list(found["usage"]) == ["prompt_tokens", "cached_tokens", "completion_tokens"]
    assert list(found["timing"]) == ["load_s", "prefill_s", "decode_s", "prefill_tok_s", "decode_tok_s"]
    prompt = f"[file name]: {note}\n[file content begin]\nThe code is 7319.\n\n[file content end]\nWhat is the code?"
    assert found["usage"] == {
        "prompt_tokens": len(prompt.encode()) + 4,  # begin of sentence, user, assistant, </think>
        "cached_tokens": 0,
        "completion_tokens": 12,
    }
    assert all(isinstance(value, float) and value > 0 for value in found["timing"].values())
    assert (found["finish_reason"], found["seed"], found["device"]) == ("length", 3, "cpu")
    assert found["model"] == str(model)
    assert found["text"] not in done.err or not found["text"].strip()


def test_a_seed_repeats_the_answer_and_none_draws_a_new_one(cli: Cli, model: Path) -> None:
    first = cli("run", "Why?", "--model", model, "--json", "--max-tokens", "12").json
    second = cli("run", "Why?", "--model", model, "--json", "--max-tokens", "12").json
    again = cli("run", "Why?", "--model", model, "--json", "--max-tokens", "12", "--seed", str(first["seed"])).json
    assert first["seed"] != second["seed"]
    assert again["text"] == first["text"]


def test_json_text_is_what_is_printed(cli: Cli, model: Path) -> None:
    arguments = ["run", "Why?", "--model", model, *TINY_ANSWER]
    assert cli(*arguments).out.rstrip("\n") == cli(*arguments, "--json").json["text"].rstrip("\n")


def test_thinking_is_shown_apart_and_a_limit_in_it_is_said(cli: Cli, model: Path) -> None:
    arguments = ["run", "Why?", "--model", model, "--think", "high", *TINY_ANSWER]
    found = cli(*arguments, "--json").json
    assert found["finish_reason"] == "length_thinking"
    assert (found["text"], len(found["reasoning"]) > 0) == ("", True)
    done = cli(*arguments)
    assert done.code == 0
    assert done.out == ""
    assert found["reasoning"].strip() in done.err
    assert "ran out while the model was still thinking, so there is no answer" in done.err


def test_max_thinking_in_a_small_context_is_advised_against(cli: Cli, model: Path) -> None:
    done = cli("run", "Why?", "--model", model, "--think", "max", "--max-tokens", "2")
    assert done.code == 0
    assert "note: --think max is meant for contexts of 384K tokens and more; this one holds 4,096" in done.err


def test_system_message_and_stop_string(cli: Cli, model: Path) -> None:
    plain = cli("run", "Why?", "--model", model, "--json", *TINY_ANSWER).json
    told = cli("run", "Why?", "--model", model, "--json", "--system", "Be brief.", *TINY_ANSWER).json
    assert told["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + len("Be brief.")
    mark = plain["text"][1]
    stopped = cli("run", "Why?", "--model", model, "--json", "--stop", mark, *TINY_ANSWER).json
    assert stopped["finish_reason"] == "stop_string"
    assert stopped["text"] == plain["text"][: plain["text"].index(mark)]


def test_standard_input_is_the_message(cli: Cli, model: Path) -> None:
    piped = cli("run", "--file", "-", "--model", model, "--json", *TINY_ANSWER, input="Why?").json
    assert piped["text"] == cli("run", "Why?", "--model", model, "--json", *TINY_ANSWER).json["text"]


def test_what_is_left_out_of_a_folder_is_said(cli: Cli, model: Path, note: Path) -> None:
    (note.parent / "picture.bin").write_bytes(b"\0\1")
    done = cli("run", "What?", "--file", note.parent, "--model", model, "--max-tokens", "1")
    assert f"skipped {note.parent}/picture.bin: binary file" in done.err


def test_default_model_comes_from_the_environment(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_MODEL", str(model))
    assert cli("run", "Why?", "--json", "--max-tokens", "1").json["model"] == str(model)


def test_context_is_filled_to_the_last_token(cli: Cli, model: Path) -> None:
    found = cli("run", "x" * 50, "--model", model, "--ctx", "64", "--seed", "3", "--json").json
    assert found["finish_reason"] == "context_full"
    assert found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"] == 64


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(cli: Cli, model: Path) -> None:
    done = cli("run", "x" * 60, "--model", model, "--ctx", "64")
    assert (done.code, done.out) == (2, "")
    assert "the prompt has 64 tokens and the context holds 64, the answer included" in done.err
    assert "up to 4,096" in done.err
    done = cli("run", "x" * CTX, "--model", model)
    assert done.code == 2
    assert "dsv4 never cuts a prompt" in done.err


def test_special_tokens_in_a_file_stay_text(cli: Cli, model: Path, note: Path) -> None:
    mark = "<｜User｜>"
    note.write_text(mark)
    found = cli("run", "--file", note, "--model", model, "--json", "--max-tokens", "1").json
    assert found["usage"]["prompt_tokens"] == len(mark.encode()) + 4


def test_ctrl_c_ends_with_what_there_is(model: Path) -> None:
    command = [sys.executable, "-m", "dsv4cli", "run", "Why?", "--model", str(model), "--seed", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    begun = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert (begun + out).endswith(b"\n")
    assert b"stopped; this is what there was" in err


@pytest.mark.parametrize(("call", "drawn"), [(5, 3), (1, 0)], ids=["while answering", "while reading the prompt"])
def test_ctrl_c_with_json(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch, call: int, drawn: int) -> None:
    from dsv4_engine import Session

    calls = 0
    extend = Session.extend

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(signal.SIGINT)
        return extend(*arguments, **options)

    monkeypatch.setattr(Session, "extend", interrupted)
    done = cli("run", "Why?", "--model", model, "--json", "--seed", "3")
    assert done.code == 130
    assert done.json["finish_reason"] == "cancelled"
    assert done.json["usage"]["completion_tokens"] == drawn
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_rates_of_a_prompt_that_was_not_read_to_its_end() -> None:
    whole = Outcome(prompt_tokens=1000, cached_tokens=100, prefill_s=2.0)
    stopped = Outcome(prompt_tokens=1000, cached_tokens=100, prefill_s=2.0, read=300)
    assert (whole.prefill_rate, stopped.prefill_rate) == (450, 100)
    how = How(Sampling())
    assert next(closing_lines(whole, how)).startswith("1,000 tokens in (100 kept), 450/s")
    assert next(closing_lines(stopped, how)).startswith("300 of 1,000 tokens in (100 kept), 100/s")


def test_a_reader_that_leaves_is_no_traceback(model: Path) -> None:
    command = f"{sys.executable} -m dsv4cli run Why? --model {model} --max-tokens 200 --seed 3 | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, env=environment(), timeout=120)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
