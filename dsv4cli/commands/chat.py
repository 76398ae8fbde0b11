"""`dsv4 chat`: a conversation that keeps its history and reuses its prefix."""

from __future__ import annotations

import sys
from dataclasses import replace

import typer

from dsv4cli import options


def chat(
    context: typer.Context,
    file: options.Files = None,
    load: options.Load = None,
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
    """Talk with the model; /help lists what can be typed besides questions.

    Ctrl-C stops the answer, Ctrl-D leaves.
    With --json the answers go to standard error, and the conversation is printed as one JSON document at the end.

    Examples:

    [bold]dsv4 chat --file report.txt[/bold]

    [bold]dsv4 chat --model v4-flash --think high --ctx 128K[/bold]

    [bold]dsv4 chat --load yesterday.json[/bold]
    """
    from dsv4cli import answering, files, output
    from dsv4cli.conversation import Conversation, read
    from dsv4cli.errors import reported
    from dsv4cli.keeping import Keeping, refuse_beside_resume, take_up
    from dsv4cli.talk import Talk

    with reported():
        resumed = None
        placed = options.Placed.of(device_map, gpu_mem, cpu_mem)
        if resume:
            refuse_beside_resume(context, ["cache_dir", "cache_policy", "json", "file", *options.PLACED])
            resumed = take_up("chat")
        kept = read(load) if load else None
        reading = files.read_paths(file or [])
        if resumed:
            request = resumed[0]
            (engine, _), how, ctx = request.load(placed), request.settings(), request.ctx
            how = replace(how, sampling=replace(how.sampling, seed=request.chat["seed"]))
        else:
            computed = options.computed_in(dtype, device)
            engine, _ = answering.load(model, device=device, dtype=computed, kv_dtype=kv_dtype, ctx=ctx, placed=placed)
            sampling = answering.sampling(engine, temperature, top_p, min_p, seed)
            how = answering.How(sampling, think, max_tokens, tuple(stop or ()))
        engine.tokenizer  # noqa: B018 - a model without one is refused now, not at the first question
        with Keeping.of("chat", engine, ctx, cache_dir, cache_policy, nothing=no_cache) as keeping:
            conversation = Conversation(engine, keeping)
            talk = Talk(conversation, how, sys.stderr if json else sys.stdout)
            if resumed:
                talk.take_up(*resumed)
            if kept:
                talk.restore(kept)
            if system is not None:
                conversation.system = system
            talk.attach(reading)
            talk.loop()
            conversation.close()
            if json:
                output.print_json(conversation.document(talk.how.think))
