"""`dsv4 run`: one answer about files, folders or standard input."""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4cli import options

if TYPE_CHECKING:
    from dsv4_engine import Engine
    from dsv4cli.answering import Outcome


def run(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The question. Without it the file is the message.")
    ] = None,
    file: options.Files = None,
    model: options.Model = options.DEFAULT_MODEL,
    ctx: options.Ctx = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    kv_dtype: options.KvDtypeOption = options.KvDtype.mixed,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = "auto",
    gpu_mem: options.GpuMem = None,
    cpu_mem: options.CpuMem = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    think: options.ThinkOption = options.Think.none,
    system: options.System = None,
    cache_dir: options.CacheDir = None,
    no_cache: options.NoCache = False,
    cache_policy: options.CachePolicy = options.DEFAULT_POLICY,
    resume: options.Resume = False,
    json: options.Json = False,
) -> None:
    """Answer one question about files, folders or standard input.

    The answer goes to standard output, thinking and everything else to standard error.
    A prompt that does not fit the context is an error; nothing is ever cut.
    What was read is kept on disk, so that a second question about it is answered at once (see `dsv4 cache`).

    Examples:

    [bold]dsv4 run "What does this do?" --file main.py[/bold]

    [bold]dsv4 run "Where is the cache written?" --file src --file 'docs/*.md' --temperature 0[/bold]

    [bold]git diff | dsv4 run "Review this change." --file - --think high[/bold]
    """
    from dsv4cli import answering, files, output
    from dsv4cli.errors import INTERRUPTED, reported
    from dsv4cli.keeping import Keeping, refuse_beside_resume, take_up

    with reported():
        resumed = None
        placed = options.Placed.of(device_map, gpu_mem, cpu_mem)
        if resume:
            refuse_beside_resume(context, ["cache_dir", "cache_policy", "json", *options.PLACED])
            request, resumed = take_up("run")
            engine, load_s = request.load(placed)
            ids, how, ctx = request.ids, request.settings(), request.ctx
        else:
            reading = files.read_paths(file or [])
            for line in files.skipped_lines(reading.skipped):
                output.note(line, style="dim")
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": files.message_of(prompt, reading.documents)})

            engine, load_s = answering.load(
                model,
                device=device,
                dtype=options.computed_in(dtype, device),
                kv_dtype=kv_dtype,
                ctx=ctx,
                placed=placed,
            )
            # A seed is always known, so that any answer can be repeated; 53 bits survive any reader of JSON.
            seed = secrets.randbits(53) if seed is None else seed
            sampling = answering.sampling(engine, temperature, top_p, min_p, seed)
            how = answering.How(sampling, think, max_tokens, tuple(stop or ()))
            ids = answering.prompt_ids(engine, messages, think)
            answering.check_fits(engine, len(ids))
            if advice := answering.thinking_advice(think, engine.ctx):
                output.note(advice)

        screen = answering.Screen(None if json else sys.stdout)
        with Keeping.of("run", engine, ctx, cache_dir, cache_policy, nothing=no_cache) as keeping:
            recorder = resumed or keeping.begin(ids, how)
            outcome = answering.stream_answer(engine, ids, how, screen=screen, keeping=keeping, recorder=recorder)
            kept = recorder.written and outcome.finish_reason == "cancelled"
            recorder.leave() if kept else recorder.remove()
        if json:
            output.print_json(_document(engine, outcome, load_s, how.sampling.seed))
        answering.show_closing(outcome, how)
        if outcome.finish_reason == "cancelled":
            if kept:
                output.note("`dsv4 run --resume` goes on with it", style="dim")
            raise typer.Exit(INTERRUPTED)


def _document(engine: Engine, outcome: Outcome, load_s: float, seed: int | None) -> dict[str, Any]:
    return {
        "text": outcome.text,
        "reasoning": outcome.reasoning,
        "finish_reason": outcome.finish_reason,
        "usage": {
            "prompt_tokens": outcome.prompt_tokens,
            "cached_tokens": outcome.cached_tokens,
            "completion_tokens": outcome.completion_tokens,
        },
        "timing": {
            "load_s": load_s,
            "prefill_s": outcome.prefill_s,
            "decode_s": outcome.decode_s,
            "prefill_tok_s": outcome.prefill_rate,
            "decode_tok_s": outcome.decode_rate,
        },
        "model": engine.name,
        "device": engine.device,
        "seed": seed,
    }
