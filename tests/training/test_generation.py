"""Answers of the model in training against the engine's, one at a time, from the exported checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_engine import Engine
from dsv4_engine.encoding import encode_messages
from dsv4_training.export import load_parameters, save_checkpoint
from dsv4_training.generation import Writer
from dsv4_training.model import Mode, Network
from dsv4_training.parameters import working_weights
from training.common import lively_parameters, small_config

CPU = torch.device("cpu")
END = 1
COUNT = 14
KEYS = ((3, "otter"), (40, "Vera"), (70, "lake-stone"))


def prompts(lengths: list[int], room: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 512, (len(lengths), room), generator=torch.Generator().manual_seed(2))
    return ids, torch.tensor(lengths)


def engines_answer(engine: Engine, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and by how much each was ahead of the next best."""
    session, out, leads = engine.session(), [], []
    logits = session.extend(prompt)
    for _ in range(count):
        best = logits.topk(2)
        out.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
        logits = session.extend(out[-1:])
    return out, leads


def test_greedy_answers_are_the_engines(tmp_path: Path) -> None:
    """Prompts that end at the start, in the middle and at the end of blocks; the answers go beyond a block of 128."""
    config = small_config(index_topk=16, index_n_heads=8)
    parameters = lively_parameters(config)
    save_checkpoint(tmp_path, config, parameters, "{}", quantised=False)
    engine = Engine.load(str(tmp_path), kv_dtype="fp32")
    lengths, count = [253, 3, 128, 250], 12
    ids, sizes = prompts(lengths, 256)
    writer = Writer(config, 4, 1, 384, Mode(sparse=True, dtype=torch.float32), CPU)
    writer.read(working_weights(parameters, False, torch.float32), ids, sizes)
    written = writer.write(count, -1, 0.0)
    for row, length in enumerate(lengths):
        theirs, leads = engines_answer(engine, ids[row, :length].tolist(), count)
        assert written.ids[row].tolist() == theirs
        assert min(leads) > 1e-3, "two tokens are as likely: choose other prompts"


def test_published_precision_answers_are_the_engines() -> None:
    """The bundled model, whose answers are sure enough to bear a different order of sums, on questions about facts."""
    engine = Engine.load("tiny")
    config, parameters = load_parameters(engine.path)
    asked = [f"{'Grass is green. ' * n}The code for {key} is {n}71{n}. What is the code for {key}?" for n, key in KEYS]
    texts = [engine.tokenizer.encode(encode_messages([{"role": "user", "content": t}], "chat")) for t in asked]
    ids = torch.zeros(len(texts), 512, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    writer = Writer(config, len(texts), 1, 640, Mode(True, True, dtype=torch.float32), CPU)
    with torch.no_grad():
        weights = working_weights(parameters, True, torch.float32)
    writer.read(weights, ids, torch.tensor([len(text) for text in texts]))
    written = writer.write(COUNT, -1, 0.0)
    compared = 0
    for row, text in enumerate(texts):
        theirs, leads = engines_answer(engine, text, COUNT)
        sure = next((i for i, lead in enumerate(leads) if lead < 0.5), COUNT)
        assert written.ids[row, :sure].tolist() == theirs[:sure]
        compared += sure
    assert compared >= 0.7 * COUNT * len(texts)


def test_groups_continue_one_prompt_and_end_on_their_own() -> None:
    """Several answers to a prompt are those to as many copies of it; tokens behind the end do not count."""
    config = small_config()
    weights = {n: p.detach() for n, p in lively_parameters(config).items()}
    mode = Mode(False, True, dtype=torch.float32)
    ids, sizes = prompts([130, 77], 256)
    grouped, alone = Writer(config, 2, 3, 384, mode, CPU), Writer(config, 6, 1, 384, mode, CPU)
    grouped.read(weights, ids, sizes)
    alone.read(weights, ids.repeat_interleave(3, 0), sizes.repeat_interleave(3))
    written = [w.write(20, 5, 1.0, torch.Generator().manual_seed(1)) for w in (grouped, alone)]
    assert torch.equal(written[0].ids, written[1].ids)
    assert len({tuple(row) for row in written[0].ids.tolist()}) == 6
    end = int(written[0].ids[0, 4])
    grouped.read(weights, ids, sizes)
    again = grouped.write(20, end, 1.0, torch.Generator().manual_seed(1))
    stop = written[0].ids[0].tolist().index(end)
    assert int(again.lengths[0]) == stop + 1
    assert again.ids[0, stop:].eq(end).all()
    assert again.logprobs[0, stop + 1 :].eq(0).all()


def test_log_probabilities_are_the_forward_pass() -> None:
    config = small_config()
    weights = {n: p.detach() for n, p in lively_parameters(config).items()}
    writer = Writer(config, 1, 2, 256, Mode(dtype=torch.float32), CPU)
    ids, sizes = prompts([100], 128)
    writer.read(weights, ids, sizes)
    written = writer.write(40, -1, 0.7, torch.Generator().manual_seed(1))
    whole = torch.cat([ids[:, :100].expand(2, -1), written.ids], 1)
    padded = torch.nn.functional.pad(whole, (0, 116))
    logits = Network(config).logits(weights, padded, Mode(dtype=torch.float32))[:, 99:139]
    expected = (logits / 0.7).log_softmax(-1).gather(2, written.ids[..., None])[..., 0]
    torch.testing.assert_close(written.logprobs, expected, atol=2e-4, rtol=1e-4)


def test_no_room_is_an_error() -> None:
    config = small_config()
    writer = Writer(config, 1, 1, 128, Mode(False, True, dtype=torch.float32), CPU)
    weights = {n: p.detach() for n, p in lively_parameters(config).items()}
    writer.read(weights, *prompts([120], 128))
    with pytest.raises(ValueError, match="9 tokens after a prompt of 120 are more than the room for 128"):
        writer.write(9, END, 0.0)
