"""The tables of `dermfm plan`."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from dermfm import memory
from dermfm.model.summary import print_summary
from dermfm.plan import Plan, TrainConfig
from dermfm.scale import GB, Need, ScaleConfig, Sizes, measure, need, parts_of, remedies, sent_bytes, sharding, steps_of

TRACED, COUNTED, ASSUMED = "traced", "arithmetic", "assumed"


def show(config: ScaleConfig) -> None:
    """Print the plan and its verdict."""
    p = steps_of(config)
    sizes = measure(config, config.world, p)
    how = sharding(config, config.world)
    found = need(config, sizes, how, p, config.reserve_gb * GB)
    console = Console(width=120)
    console.print(_model(config, sizes, p), highlight=False, markup=False)
    console.print(_memory(config, sizes, found, f"of {config.gpu_memory_gb:g}; "))
    console.print(_run(config, sizes, p))
    for line in verdict(config, sizes, found, p):
        console.print(line, highlight=False, markup=False)


def show_run(config: TrainConfig, world: int) -> None:
    """Print for `train --dry-run` what a run on `world` ranks is made of: its model, and all of the plan but a verdict.

    InputError for what no model can be built of, or a note encoder that is neither on this machine nor of known shape.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    planned = ScaleConfig(**values, nodes=world, gpus=1, reserve_gb=0.0)
    p = steps_of(planned)
    print_summary(parts_of(config))
    sizes = measure(planned, world, p)
    found = need(planned, sizes, sharding(planned, world), p, reserve=0.0)
    console = Console(width=120)
    console.print(_memory(planned, sizes, found, "and the CUDA context; "))
    console.print(_run(planned, sizes, p))


def _model(config: ScaleConfig, sizes: Sizes, p: Plan) -> str:
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes.by_part.items())
    return (
        f"{config.model.image.name} at {config.model.image.size} px, {config.model.text.name} at "
        f"{config.model.text.max_tokens} tokens\n"
        f"{sizes.total / 1e6:.1f} M parameters, {sizes.learning / 1e6:.1f} M of them learn: {parts}\n"
        f"{config.nodes} nodes × {config.gpus} GPUs = {config.world} ranks × {p.num_micro} micro-batches × "
        f"{p.micro_batch} = {config.contrastive_batch} pairs in one softmax"
    )


def memory_rows(config: ScaleConfig, sizes: Sizes, found: Need) -> list[tuple[str, float, str, str]]:
    """(part, bytes, source, how it comes about) of a rank's memory."""
    how = sharding(config, config.world)
    states = found.states
    micro = f"one micro-batch: {sizes.saved / GB:.2f} GB saved for backward, the rest passing"
    rows = [
        ("parameters", states.parameters, COUNTED, f"{how.element}Ψ{'/N' if how.stage == 3 else ''}"),
        ("frozen parameters", states.frozen, COUNTED, f"{how.element} bytes each{', /N' if how.stage == 3 else ''}"),
        ("gradients", states.gradients, COUNTED, f"{how.element}Ψ{'/N' if how.stage >= 2 else ''}"),
        ("optimizer", states.optimizer, COUNTED, f"{how.optimizer_element}Ψ{'/N' if how.stage else ''}, float32"),
        ("batch", found.batch, COUNTED, "uint8 pixels and note tokens of the rank's whole part"),
        ("activations", found.activations, TRACED, micro),
        ("contrast", found.contrast, TRACED, "similarities B²/N and features of all ranks"),
        ("buffers", found.buffers, COUNTED, "communication buckets" + ("; parameters gathered" * (how.stage == 3))),
        ("optimizer step", found.update, COUNTED, "instead of activations, contrast and buffers"),
        ("reserve", found.reserve, ASSUMED, "CUDA context, workspace, fragmentation"),
    ]
    return rows + ([("host memory", states.host, COUNTED, "offloaded, a rank")] if states.host else [])


def _memory(config: ScaleConfig, sizes: Sizes, found: Need, limit: str) -> Table:
    how = sharding(config, config.world)
    table = Table(title=f"Memory per GPU: ZeRO stage {how.stage}, {how.precision}: {how.formula}")
    table.add_column("part")
    table.add_column("GB", justify="right")
    table.add_column("known by")
    table.add_column("what it is")
    for part, size, source, what in memory_rows(config, sizes, found):
        if part == "reserve" and not size:
            continue
        table.add_row(part, f"{size / GB:.2f}", source, what)
    table.add_section()
    together = "with the contrast" if found.together else "activations or contrast, whichever is more"
    table.add_row("peak on the GPU", f"{found.peak / GB:.2f}", "", f"{limit}{together}")
    return table


def run_rows(config: ScaleConfig, sizes: Sizes, p: Plan) -> list[tuple[str, str, str]]:
    """(what, value, how it comes about) of time, disk and network."""
    how = sharding(config, config.world)
    samples = p.total_steps * config.contrastive_batch
    rows = [("steps", f"{p.total_steps}", f"{config.epochs:g} epochs of {p.num_samples} samples")]
    if config.samples_per_s:
        hours = samples / config.samples_per_s / 3600
        note = f"{config.samples_per_s / config.world:.1f} samples/s a GPU"
        rows.append(("time", f"{hours:.2f} h", f"{samples} samples at {config.samples_per_s:g}/s; {note}"))
    size = memory.checkpoint_size(sizes.learning, sizes.frozen, how)
    number = -(-p.total_steps // p.checkpoint_steps)
    rows.append(("checkpoint", f"{size.total / GB:.2f} GB", f"{size.largest_rank / GB:.2f} GB by the busiest rank"))
    rows.append(("checkpoint write", f"{size.total / GB / config.disk_gb_s:.1f} s", f"at {config.disk_gb_s:g} GB/s"))
    kept = config.keep_last + (p.total_steps // config.keep_every if config.keep_every else 0)
    kept = min(kept + 1, number + 1)  # one more while it is written
    rows.append(("disk", f"{kept * size.total / GB:.1f} GB", f"{number} checkpoints, at most {kept} there at one time"))
    sent = memory.communication(
        sizes.learning,
        sizes.total,
        how,
        p.num_micro,
        config.contrastive_batch,
        config.model.embed_dim,
        sent_bytes(config),
    )
    for name, count in sent.items():
        rows.append((f"sent: {name}", f"{count / GB:.3f} GB", "a rank and step"))
    if config.network_gb_s:
        seconds = sum(sent.values()) / GB / config.network_gb_s
        rows.append(("sending", f"{seconds:.3f} s", f"a step at {config.network_gb_s:g} GB/s, if nothing overlaps"))
    return rows


def _run(config: ScaleConfig, sizes: Sizes, p: Plan) -> Table:
    table = Table(title="Run: time, disk, communication (arithmetic)")
    for name in ("what", "value", "how"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for row in run_rows(config, sizes, p):
        table.add_row(*row)
    return table


def verdict(config: ScaleConfig, sizes: Sizes, found: Need, p: Plan) -> list[str]:
    """Lines that say whether the run fits, and else what to change."""
    limit = config.gpu_memory_gb * GB
    host = found.states.host * config.gpus
    if config.host_memory_gb and host > config.host_memory_gb * GB:
        return [f"does not fit: {host / GB:.0f} GB offloaded on a node of {config.host_memory_gb:g} GB"]
    if found.peak <= limit:
        return [f"fits: {found.peak / GB:.1f} of {config.gpu_memory_gb:g} GB, {(1 - found.peak / limit):.0%} free"]
    lines = [f"does not fit: {found.peak / GB:.1f} of {config.gpu_memory_gb:g} GB. Any one of these:"]
    return lines + [f"  {line}" for line in remedies(config, sizes, p)]
