"""DeepSpeed: our dataclass → its JSON, initialize, save and load, conversion between world sizes. The only importer."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dermfm import memory
from dermfm.config import InputError, check_choice, check_range, key
from dermfm.model.weights import Sharding, sharded
from dermfm.writer import BackgroundWriter, install

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIVERSAL_VERSION = 0.2  # of DeepSpeed's universal checkpoint; its converter asks for the entry at stages 1 and 2

# Layouts that DeepSpeed's universal form does not know: on another number of ranks it fails, or puts states elsewhere.
UNRESUMABLE = ("round_robin_gradients", "elastic_checkpoint")
# What `zero.extra` cannot set, and the key that does: arithmetic of batches, schedule and resumption rest on it.
OWNED = {
    "train_batch_size": "contrastive_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "contrastive_batch and micro_batch",
    "managed_gradient_accumulation": "contrastive_batch and micro_batch",
    "zero_optimization.stage": "zero.stage",
    "bf16.enabled": "zero.precision",
    "fp16.enabled": "zero.precision",
    "scheduler": "optimizer.schedule",
    "checkpoint.load_universal": "resume",
}
STALE_S = 1200.0  # after which a build of DeepSpeed's extension that wrote nothing counts as killed


@dataclass(kw_only=True)
class ZeroConfig:
    """How DeepSpeed shards and computes."""

    stage: int = key(1, "ZeRO stage: 0 none, 1 optimizer states, 2 and gradients, 3 and parameters sharded over ranks")
    precision: str = key("fp32", "fp32, bf16 or fp16 (with dynamic loss scale)")
    gradient_clipping: float = key(1.0, "largest global gradient norm; 0 switches clipping off")
    offload_optimizer: bool = key(False, "keep optimizer states in CPU memory (stages 1 to 3)")
    offload_parameters: bool = key(False, "keep parameters in CPU memory (stage 3)")
    bucket_elements: int | None = key(
        None, "elements a communication bucket; null: a tenth of what learns, within 5 to 200 million"
    )
    overlap: bool | None = key(
        None, "reduce gradients while the backward pass goes on (stages 2 and 3); null: on GPUs at those stages"
    )
    extra: dict[str, Any] = key({}, "merged into DeepSpeed's JSON as it is: the escape hatch")

    def __post_init__(self) -> None:
        check_range("zero.stage", self.stage, 0, 3)
        check_choice("zero.precision", self.precision, DTYPES)
        check_range("zero.gradient_clipping", self.gradient_clipping, 0)
        if self.bucket_elements is not None:
            check_range("zero.bucket_elements", self.bucket_elements, 1000)
        check_extra(self.extra, self.stage)
        if self.overlap and self.stage < 2:
            # DeepSpeed's own limit: below stage 2 only with a boundary of its own, and we own the boundary.
            raise ValueError(f"zero.overlap: needs zero.stage 2 or 3, it is {self.stage}; leave it null")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"zero.offload_parameters: needs zero.stage=3, it is {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("zero.offload_optimizer: needs zero.stage 1, 2 or 3, it is 0")


def check_extra(extra: Mapping[str, Any], stage: int) -> None:
    """ValueError where `zero.extra` contradicts a key of ours, or asks for what resumption or this stage cannot do."""
    for name in ("zero_optimization", "bf16", "fp16", "optimizer", "checkpoint", "data_types"):
        if not isinstance(extra.get(name, {}), Mapping):
            raise ValueError(
                f"zero.extra.{name}: {extra[name]!r} is not valid; give keys of DeepSpeed's section {name}"
            )
    for name, own in OWNED.items():
        section, _, entry = name.rpartition(".")
        if entry in (extra.get(section, {}) if section else extra):
            raise ValueError(f"zero.extra.{name}: cannot be set here; it follows from {own}")
    zero = extra.get("zero_optimization", {})
    for name in UNRESUMABLE:
        if zero.get(name):
            raise ValueError(
                f"zero.extra.zero_optimization.{name}: a run with it could not go on with another number of ranks; "
                "leave it out"
            )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme" and stage != 3:
            # DeepSpeed would keep it in CPU memory, without a word.
            raise ValueError(
                f"zero.extra.zero_optimization.{name}: nvme needs zero.stage=3, it is {stage}; below, "
                "zero.offload_optimizer=true keeps the states in CPU memory"
            )


def deepspeed_json(
    config: ZeroConfig,
    *,
    micro_batch: int,
    num_micro: int,
    world: int,
    optimizer: dict[str, Any],
    device: str,
    num_learning: int,
    num_parameters: int,
    load_universal: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's configuration: batch arithmetic, precision, ZeRO, AdamW; `zero.extra` merged on top.

    Sizes of buckets follow the parameters of the model, of which `num_learning` learn.
    """
    zero = _zero_section(config, num_learning, num_parameters, device)
    on_host = config.offload_optimizer or not device.startswith("cuda")
    plain = {
        "train_batch_size": micro_batch * num_micro * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": zero,
        "checkpoint": {"load_universal": load_universal},
        # DeepSpeed's own kernels need a build on first use. Torch's runs over all tensors at once on CUDA; in host
        # memory only its fused form is one pass over a rank's states, without temporary tensors of their size.
        "optimizer": {"type": "AdamW", "params": {**optimizer, "torch_adam": True, "fused": on_host}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }
    if config.precision != "fp32":
        # DeepSpeed casts parameters only: pixels, normalised by float32 buffers, would not fit the weights.
        plain["data_types"] = {"buffer_dtype": config.precision}
    settings = merge(plain, config.extra)
    # Divided before they are summed, as the scatter does by itself: the sum of many ranks could be too large for fp16.
    settings.setdefault("prescale_gradients", not settings["zero_optimization"].get("reduce_scatter", True))
    return settings


def _zero_section(config: ZeroConfig, num_learning: int, num_parameters: int, device: str) -> dict[str, Any]:
    on_gpu = device.startswith("cuda")
    zero: dict[str, Any] = {"stage": config.stage}
    if config.stage:
        bucket = config.bucket_elements or memory.bucket_elements(num_learning)
        overlap = config.stage >= 2 and on_gpu if config.overlap is None else config.overlap
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "overlap_comm": overlap}
    if config.stage in (1, 2):
        # Below stage 3 DeepSpeed's scatter is an all-reduce, too, with a copy of the bucket before it and one after it.
        zero["reduce_scatter"] = False
    if config.stage == 1 and not on_gpu and config.precision == "fp32" and not config.offload_optimizer:
        zero["contiguous_gradients"] = False  # no bucket: `dermfm.shares` packs gradients once, after the last of them
    if config.stage == 3:
        live = memory.live_elements(num_parameters)
        # DeepSpeed's own defaults (a billion) keep most models gathered throughout, as if nothing were sharded.
        zero |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
        zero |= {"stage3_prefetch_bucket_size": min(zero["reduce_bucket_size"], live // 2)}
    where = {"device": "cpu", "pin_memory": on_gpu}
    if config.offload_optimizer:
        zero["offload_optimizer"] = where
    if config.offload_parameters:
        zero["offload_param"] = where
    return zero


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid onto `base`, dictionaries merged level by level."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


@contextlib.contextmanager
def towers_in_shards(settings: dict[str, Any], device: str) -> Iterator[None]:
    """Inside, at stage 3, towers with pretrained weights are built and filled without any rank holding a whole one.

    Each layer is sharded as soon as it is built. Then one tensor at a time is gathered, written by rank 0 from the
    mapped file, sent to all and sharded again. Below stage 3 nothing changes. Collective.
    """
    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    deepspeed = _deepspeed(device)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # Its own view of the group that exists already: else it takes the world for one process.
    deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)

    @contextlib.contextmanager
    def pretrained() -> Iterator[None]:
        """Hugging Face's `from_pretrained` does the same by itself where this object is alive."""
        alive = HfDeepSpeedConfig(settings)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del alive

    sharding = Sharding(
        structure=lambda: deepspeed.zero.Init(config_dict_or_path=settings),
        whole=lambda tensors: deepspeed.zero.GatheredParameters(tensors, modifier_rank=0),
        pretrained=pretrained,
        is_first=dist.get_rank() == 0,
    )
    with sharded(sharding):
        yield


def initialize(model: nn.Module, groups: list[dict[str, Any]], settings: dict[str, Any], device: str) -> Any:
    """A DeepSpeed engine over `model` in the existing process group. `groups` are torch parameter groups.

    `model` is equal on every rank, in CPU memory; below stage 3 it moves to the device, at stage 3 only this rank's
    share of it does. Whole, but for towers that were built in `towers_in_shards`.
    """
    deepspeed = _deepspeed(device)
    if settings["zero_optimization"]["stage"] < 3:
        model.to(device)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=groups, config=settings, dist_init_required=False
        )
    except (AssertionError, ValueError, deepspeed.DeepSpeedConfigError) as error:
        raise InputError(f"zero: DeepSpeed refuses this configuration: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if "Unable to JIT load" not in str(error):
            raise
        needed = " ".join(str(error).split())
        raise InputError(
            f"zero: this configuration needs a part of DeepSpeed that cannot be built here: {needed}; "
            "NVMe needs libaio and its headers"
        ) from error
    install(engine)
    engine._copy_recovery_script = lambda folder: None  # a program beside every checkpoint, which nobody calls
    return engine


def num_elements(parameter: Tensor) -> int:
    """Elements of a whole parameter, also of one that stage 3 holds in shards."""
    return getattr(parameter, "ds_numel", parameter.numel())


def save(engine: Any, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
    """Every rank writes its part under folder/tag. Collective."""
    state = {**client_state, "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION}}
    engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)


def written(engine: Any, folder: Path) -> list[dict[str, Any]]:
    """What this rank has written into a checkpoint folder: name, size and sha256 of each file. Waits for its writer."""
    writer = getattr(engine, "checkpoint_engine", None)
    return writer.files(folder) if isinstance(writer, BackgroundWriter) else []


def load(engine: Any, folder: Path, tag: str) -> None:
    """Every rank reads its part of folder/tag, native or universal as the engine was told. Collective.

    Weights and moments are the checkpoint's; rates and decay of the parameter groups stay those of the configuration.
    """
    own = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise InputError(f"{folder / tag}: DeepSpeed cannot load this checkpoint")
    # Left set, the next save would write model files on the first rank only, and stage 3 could not load them.
    engine._config.load_universal_checkpoint = False
    # Stage 3's universal loader gives every group the values of the first one, and all moments one and the same step
    # counter, which then runs as many times too fast as there are groups.
    for group, values in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(values)
    for moments in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if isinstance(moments.get("step"), Tensor):
            moments["step"] = moments["step"].clone()


def convert_universal(source: Path, target: Path) -> None:
    """Write the universal form of checkpoint `source` as folder `target` (any world size loads it), in one process.

    DeepSpeed's own converter runs as a program: it needs no process group. Raises RuntimeError with its last line.
    """
    partial = target.with_name(target.name + ".tmp")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(partial)]
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{source}: conversion to another world size failed: {last}")
    partial.replace(target)
    # The converter also leaves a pointer to its output folder, which has another name now.
    (target.parent / "latest_universal").unlink(missing_ok=True)


def consolidated_weights(folder: Path, tag: str) -> dict[str, Tensor]:
    """The whole model's weights, float32 on CPU, from the sharded checkpoint folder/tag of any stage and world size."""
    _deepspeed("cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = {}
    whole = folder / tag / "mp_rank_00_model_states.pt"
    if whole.is_file():  # below stage 3: the module in its training precision, frozen parameters and buffers included
        weights = torch.load(whole, map_location="cpu", weights_only=False)["module"]
    if list((folder / tag).glob("*zero_pp_rank_*optim_states.pt")):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights |= get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)  # float32 masters of what learns
    return {name: tensor.float() for name, tensor in weights.items()}


def ready(device: str) -> str:
    """DeepSpeed's version and accelerator, seen to work on `device`; RuntimeError where it takes another one."""
    deepspeed = _deepspeed(device)
    from deepspeed.accelerator import get_accelerator

    taken = get_accelerator().device_name()
    if taken != device.split(":")[0]:
        raise RuntimeError(f"DeepSpeed takes the accelerator '{taken}', the job computes on '{device}'")
    return f"{deepspeed.__version__}, accelerator {taken}, {get_accelerator().communication_backend_name()}"


def build_extension() -> None:
    """Compile what DeepSpeed's collectives on a CPU need, so that no run has to: about a minute, once."""
    _deepspeed("cpu")
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


def _clear_stale_lock(build: Path) -> None:
    """Take away the lock of a build that was killed: torch would wait for it for ever, without a word.

    A build is alive while one of its files is younger than STALE_S.
    """
    try:
        newest = max(path.stat().st_mtime for path in build.iterdir())
        if time.time() - newest > STALE_S:
            (build / "lock").unlink(missing_ok=True)
    except (OSError, ValueError):
        pass  # nothing was built here, or another rank was faster


def _deepspeed(device: str) -> Any:
    """The package, told which accelerator to use before its first import, and told to be quiet."""
    if not device.startswith("cuda"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    # Kept within this environment: in a folder of all, two environments would compile over each other's work.
    if os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        _clear_stale_lock(Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm")
    # The ninja of this environment, first: another version takes what it has built for unknown and compiles again.
    own, paths = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([own, *(path for path in paths if path != own)])
    import logging
    import warnings

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no GPU here: the user knows
    # DeepSpeed calls torch's collectives by names that torch now warns of, at stage 3 in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    return deepspeed
