"""lm-eval over the Protocol: requests, settings and resume, without a network."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the eval extra)")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from dsv4_evals.errors import EvalError, ModelError, RunError, TooLongError
from dsv4_evals.lm_eval_model import Journal, LmDrawing, ProtocolLM
from dsv4_evals.model import Settings
from support.lm_eval_case import DOCUMENT
from support.scripted_model import ScriptedModel

pytestmark = pytest.mark.usefixtures("no_network")


def generation(context: str, doc: int = 0, **kwargs: Any) -> Instance:
    return Instance("generate_until", {}, (context, {"max_gen_toks": 20, **kwargs}), 0, ("task", doc, 1))


def scoring(context: str, continuation: str, doc: int = 0, index: int = 0) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), index, ("task", doc, 1))


def plain(model: ScriptedModel, **options: Any) -> ProtocolLM:
    return ProtocolLM(model, options.pop("drawing", LmDrawing()), chat=False, **options)


def chat(model: ScriptedModel, **options: Any) -> ProtocolLM:
    return ProtocolLM(model, options.pop("drawing", LmDrawing()), **options)


def conversation(lm: ProtocolLM, text: str, opening: str = "") -> str:
    history = [{"role": "user", "content": text}]
    if opening:
        history.append({"role": "assistant", "content": opening})
    return lm.apply_chat_template(history, add_generation_prompt=not opening)


# -- answers


def test_answers_come_in_the_order_of_the_requests() -> None:
    model = ScriptedModel(lambda prompt, settings: prompt[-1])
    requests = [generation(DOCUMENT + letter, doc) for doc, letter in enumerate("zbya")]
    assert plain(model).generate_until(requests) == list("zbya")
    assert len(model.reads) == 1  # the document, once
    assert sorted(model.prompts) == sorted(DOCUMENT + letter for letter in "zbya")


def test_a_chat_with_an_opened_answer() -> None:
    model = ScriptedModel()
    lm = chat(model)
    lm.generate_until([generation(conversation(lm, "why?", opening="Because"))])
    assert model.prompts == ["[user]why?[answer]Because"]


def test_few_shot_turns_reach_the_model() -> None:
    model = ScriptedModel()
    lm = chat(model)
    history = [("system", "s"), ("user", "1+1"), ("assistant", "2"), ("user", "2+2")]
    context = lm.apply_chat_template([{"role": role, "content": content} for role, content in history])
    lm.generate_until([generation(context)])
    assert model.prompts == ["[system]s[user]1+1[assistant]2[user]2+2[answer]"]


def settings_of(drawing: LmDrawing, chatting: bool = True, **kwargs: Any) -> Settings:
    seen: list[Settings] = []

    def answer(prompt: str, settings: Settings) -> str:
        seen.append(settings)
        return "x</think>y"

    lm = ProtocolLM(ScriptedModel(answer), drawing, chat=chatting)
    lm.generate_until([generation(conversation(lm, "?") if chatting else "?", **kwargs)])
    return seen[0]


def test_settings_of_a_task() -> None:
    found = settings_of(LmDrawing(), do_sample=False, temperature=1.0, until=["\n", ""], max_gen_toks=7)
    assert found == Settings(7, temperature=0.0, stop=("\n",))
    assert settings_of(LmDrawing()).temperature == 0.0
    assert settings_of(LmDrawing(), do_sample=True).temperature == 1.0
    found = settings_of(LmDrawing(seed=5), do_sample=True, temperature=0.8, top_p=0.9, until="END")
    assert found == Settings(20, temperature=0.8, top_p=0.9, seed=5, stop=("END",))
    assert settings_of(LmDrawing(temperature=0.3), do_sample=False).temperature == 0.3


def test_thinking_has_room_of_its_own() -> None:
    thinking = LmDrawing(thinking="high", thinking_tokens=1000)
    assert settings_of(thinking, max_gen_toks=7).max_tokens == 1007
    capped = LmDrawing(max_tokens=500, thinking="high", thinking_tokens=1000)
    assert settings_of(capped, max_gen_toks=7).max_tokens == 500
    assert settings_of(LmDrawing(max_tokens=5), max_gen_toks=7).max_tokens == 5


def test_thinking_takes_what_the_context_leaves() -> None:
    seen: list[int] = []

    def answer(prompt: str, settings: Settings) -> str:
        seen.append(settings.max_tokens)
        return "</think>y"

    lm = chat(ScriptedModel(answer, ctx=100), drawing=LmDrawing(thinking="high", thinking_tokens=1000))
    lm.generate_until([generation(conversation(lm, "x" * 50), max_gen_toks=10)])
    assert seen == [100 - 2 - 50]


def test_only_what_follows_the_thinking_counts() -> None:
    model = ScriptedModel(lambda prompt, settings: "let me see 7</think>forty-two and more")
    lm = chat(model, drawing=LmDrawing(thinking="max", thinking_tokens=1000))
    assert lm.generate_until([generation(conversation(lm, "?", opening="It is"), max_gen_toks=9)]) == ["forty-two"]
    assert lm.lines[0]["reasoning"] == "let me see 7"
    assert model.prompts == ["[user]?[answer]"]  # an answer that is thought about cannot be opened before


def test_thinking_without_an_end_is_no_answer() -> None:
    lm = chat(ScriptedModel(lambda prompt, settings: "hm"), drawing=LmDrawing(thinking="high", thinking_tokens=10))
    assert lm.generate_until([generation(conversation(lm, "?"))]) == [""]
    assert lm.lines[0]["status"] == "no_answer" and lm.lines[0]["finish"] == "length_thinking"


def test_thinking_needs_a_chat() -> None:
    with pytest.raises(EvalError, match="template"):
        plain(ScriptedModel(), drawing=LmDrawing(thinking="high")).generate_until([generation("x")])


def test_what_does_not_fit_is_too_long_and_never_cut() -> None:
    model = ScriptedModel(ctx=100)
    lm = plain(model)
    exactly = 100 - 1 - 20
    assert lm.generate_until([generation("x" * exactly, 0), generation("x" * (exactly + 1), 1)]) == ["yes", ""]
    assert [line["status"] for line in lm.lines] == ["ok", "too_long"]
    assert model.prompts == ["x" * exactly]


def test_a_smaller_context_than_the_models() -> None:
    lm = plain(ScriptedModel(), ctx=50)
    lm.generate_until([generation("x" * 40)])
    assert lm.max_length == 50 and lm.lines[0]["status"] == "too_long"


def test_repeats_of_a_request_are_asked_again_with_other_seeds() -> None:
    seeds: list[int] = []

    def answer(prompt: str, settings: Settings) -> str:
        seeds.append(settings.seed)
        return str(settings.seed)

    request = generation("x", do_sample=True, temperature=1.0)
    lm = plain(ScriptedModel(answer), drawing=LmDrawing(seed=10))
    assert lm.generate_until([request] * 3) == ["10", "11", "12"]


# -- log-probabilities


def test_choices_share_their_context() -> None:
    model = ScriptedModel(likely=lambda prompt, text: (-float(len(text)), text == " a"))
    requests = [scoring("Q: one?\nA:", f" {choice}", index=i) for i, choice in enumerate(["a", "bcd"])]
    assert plain(model).loglikelihood(requests) == [(-2.0, True), (-4.0, False)]
    assert len(model.reads) == 1 and model.reads[0].chat is False


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    seen: list[tuple[str, str]] = []

    def likely(prompt: str, text: str) -> tuple[float, bool]:
        seen.append((prompt, text))
        return 0.0, True

    plain(ScriptedModel(likely=likely)).loglikelihood([scoring("The sky is  ", "blue")])
    assert seen == [("The sky is", "  blue")]


def test_an_empty_context() -> None:
    model = ScriptedModel()
    assert plain(model).loglikelihood([scoring("", "abc")]) == [(-3.0, False)]
    assert model.prompts == [""]


def test_scores_in_a_chat_are_without_thinking() -> None:
    model = ScriptedModel()
    lm = chat(model, drawing=LmDrawing(thinking="high"))
    lm.loglikelihood(
        [scoring(conversation(lm, "A or B?", opening="I say"), " A"), scoring(conversation(lm, "A?"), "A")]
    )
    assert sorted(model.prompts) == ["[user]A or B?[answer]I say", "[user]A?[answer]"]


def test_a_score_that_cannot_be_had_stops_the_run_before_it_begins() -> None:
    model = ScriptedModel(ctx=100)
    with pytest.raises(EvalError, match=r"document 1 of task has 121 tokens and the context holds 100"):
        plain(model).loglikelihood([scoring("x" * 50, "a", 0), scoring("x" * 119, "a", 1)])
    assert not model.reads
    lm = chat(model)
    with pytest.raises(EvalError, match="document 0"):
        lm.loglikelihood([scoring(conversation(lm, "x" * 99), "a")])


def test_an_empty_continuation_is_refused() -> None:
    with pytest.raises(EvalError, match="empty continuation"):
        plain(ScriptedModel()).loglikelihood([scoring("x", "")])


@pytest.mark.parametrize("ctx", [1000, 12, 7])
def test_rolling_log_probabilities_predict_every_token_once(ctx: int) -> None:
    scored: Counter[str] = Counter()

    def likely(prompt: str, text: str) -> tuple[float, bool]:
        assert len(prompt) + len(text) < ctx  # the beginning is a token too
        scored.update(text)
        return -float(len(text)), True

    text = "abcdefghijklmnopqrstuvwxyz"
    request = Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))
    assert plain(ScriptedModel(likely=likely, ctx=ctx)).loglikelihood_rolling([request]) == [-26.0]
    assert scored == Counter(text)


def test_ids_are_scored_as_lm_eval_hands_them_over() -> None:
    model = ScriptedModel()
    assert plain(model)._loglikelihood_tokens([(("ab", "c"), [97, 98], [99])]) == [(-1.0, False)]
    assert model.prompts == ["ab"]


# -- resume


def test_a_journal_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def dying(prompt: str, settings: Settings) -> str:
        if len(model.prompts) > 2:
            raise Killed
        return prompt[-1]

    model = ScriptedModel(dying)
    requests = [generation(DOCUMENT + letter, doc) for doc, letter in enumerate("abcd")]
    with pytest.raises(Killed):
        plain(model, journal=Journal(tmp_path / "requests.jsonl")).generate_until(requests)
    with (tmp_path / "requests.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')
    again = ScriptedModel(lambda prompt, settings: prompt[-1])
    done: list[tuple[int, int]] = []
    lm = plain(again, journal=Journal(tmp_path / "requests.jsonl"), progress=lambda d, total: done.append((d, total)))
    assert lm.generate_until(requests) == list("abcd")
    assert again.prompts == [DOCUMENT + "c", DOCUMENT + "d"]
    assert again.reads[0] == model.reads[0]  # the prompt is split as before
    assert done == [(2, 4), (3, 4), (4, 4)]
    assert [json.loads(line)["answer"] for line in (tmp_path / "requests.jsonl").read_text().splitlines()] == list(
        "abcd"
    )


def test_scores_are_kept_too(tmp_path: Path) -> None:
    requests = [scoring("x", "a"), Instance("loglikelihood_rolling", {}, ("text",), 0, ("task", 1, 1))]
    first = plain(ScriptedModel(), journal=Journal(tmp_path / "j"))
    expected = first.loglikelihood(requests[:1]), first.loglikelihood_rolling(requests[1:])
    model = ScriptedModel()
    again = plain(model, journal=Journal(tmp_path / "j"))
    assert (again.loglikelihood(requests[:1]), again.loglikelihood_rolling(requests[1:])) == expected
    assert not model.reads


def test_failed_and_too_long_requests_are_asked_again(tmp_path: Path) -> None:
    def failing(prompt: str, settings: Settings) -> str:
        raise ModelError("no luck") if "b" in prompt else TooLongError("too much") if "c" in prompt else KeyError()

    requests = [generation(letter, doc) for doc, letter in enumerate("bc")]
    lm = plain(ScriptedModel(failing), journal=Journal(tmp_path / "j"))
    with pytest.raises(ModelError, match="1 of 2 requests failed; the first, task, document 0: no luck"):
        lm.generate_until(requests)
    assert [line["status"] for line in lm.lines] == ["error", "too_long"]
    assert plain(ScriptedModel(), journal=Journal(tmp_path / "j")).generate_until(requests) == ["yes", "yes"]


def test_a_fatal_failure_ends_at_once() -> None:
    def failing(prompt: str, settings: Settings) -> str:
        raise ModelError("gone", fatal=True)

    model = ScriptedModel(failing)
    with pytest.raises(ModelError, match="gone"):
        plain(model).generate_until([generation("a"), generation("b")])
    assert len(model.prompts) == 1


def test_a_damaged_journal_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"key": "a", "status": "ok"}\nrubbish\n')
    with pytest.raises(RunError, match="line 2"):
        Journal(tmp_path / "j")


def test_lm_evals_own_cache_is_served_as_answers_come(tmp_path: Path) -> None:
    def dying(prompt: str, settings: Settings) -> str:
        if prompt == "b":
            raise ModelError("gone", fatal=True)
        return prompt

    with pytest.raises(ModelError):
        CachingLM(plain(ScriptedModel(dying)), str(tmp_path / "cache.db")).generate_until(
            [generation("a"), generation("b")]
        )
    model = ScriptedModel(lambda prompt, settings: prompt)
    cached = CachingLM(plain(model), str(tmp_path / "cache.db"))
    assert cached.generate_until([generation("a"), generation("b")]) == ["a", "b"]
    assert model.prompts == ["b"]
