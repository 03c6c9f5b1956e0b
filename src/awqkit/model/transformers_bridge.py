"""The only door to transformers: configs, empty and full models, tokenizers. It knows no architecture."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from awqkit.errors import CheckpointError, ModelError, gist
from awqkit.imports import importing
from awqkit.numerics.draw import draw_chances, drawn_tokens


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer, reduced to what is needed here.

    encode_all: texts to ids without special tokens, on all cores where the tokenizer can. start_tokens: the ids that
    the tokenizer itself puts before a text. render_chat: a list of chat messages to text by the tokenizer's chat
    template, or None where it has none.
    """

    encode_all: Callable[[Sequence[str]], list[list[int]]]
    start_tokens: tuple[int, ...]
    render_chat: Callable[[list[dict[str, Any]]], str] | None

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_all([text])[0]


def load_text_encoder(directory: Path, *, trust_remote_code: bool = False) -> TextEncoder:
    """The checkpoint's tokenizer. Raises CheckpointError where there is none that transformers can load."""
    with importing():
        from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(
            f"{directory}: no tokenizer (tokenizer.json, tokenizer_config.json or tokenizer.model); "
            "copy the tokenizer files of the original model into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean the same to the user
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded ({type(error).__name__}: {gist(error)}); "
            "copy the tokenizer files of the original model into it again"
        ) from error

    def encode_all(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def render_chat(messages: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False)

    has_template = getattr(tokenizer, "chat_template", None) is not None
    return TextEncoder(encode_all, _start_tokens(tokenizer), render_chat if has_template else None)


def _start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text, found by comparing an encoding with and without special tokens."""
    text = "The quick brown fox"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start])
    return ()


def load_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder, saying nothing of how its weights are quantized.

    Raises CheckpointError where the folder brings its own modelling code and that was not allowed, or where
    transformers does not know the architecture.
    """
    with importing():
        from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _needs_trust(directory) from error
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers cannot use it ({gist(error)}); "
            "fetch it again, or try a newer transformers (pip install -U transformers)"
        ) from error
    for part in (config, getattr(config, "text_config", None)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def empty_model(config: Any, *, trust_remote_code: bool = False, experts_apart: bool = False) -> nn.Module:
    """The causal language model of `config` in eval mode, parameters on the meta device, buffers computed for real.

    experts_apart: experts compute one after the other, each product a call of its own, where the model can do so.
    Raises ModelError where transformers has no decoder-only model for it, CheckpointError where it cannot build one.
    """
    _refuse_encoder_decoder(config)
    if experts_apart:
        config = deepcopy(config)
        config._experts_implementation = "eager"
    try:
        try:
            return _build_empty(config, "sdpa", trust_remote_code)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return _build_empty(config, "eager", trust_remote_code)
    except Exception as error:  # transformers and a model's own code raise many kinds
        raise _not_built(config, error) from error


def _build_empty(config: Any, attention: str, trust_remote_code: bool) -> nn.Module:
    with importing():
        from transformers import AutoModelForCausalLM

        own = _class_of_part(config)
    with _parameters_on_meta():
        if own is None:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
        else:
            model = own._from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def _class_of_part(config: Any) -> Any:
    """The causal language model that takes this very config, where transformers maps only a config around it to it.

    None for every config that it maps by itself, and where there is no such class.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if type(config) in AutoModelForCausalLM._model_mapping or not type(config).__module__.startswith("transformers."):
        return None
    package = sys.modules[type(config).__module__.rpartition(".")[0]]
    names = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    found = (getattr(package, name, None) for name in names if hasattr(package, name))
    return next((each for each in found if getattr(each, "config_class", None) is type(config)), None)


def _refuse_encoder_decoder(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{_name(config)}: model_type {config.model_type!r} is an encoder-decoder model; "
            "awqkit takes decoder-only ones"
        )


def _not_built(config: Any, error: Exception) -> CheckpointError | ModelError:
    if "trust_remote_code" in str(error):
        return _needs_trust(_name(config))
    if "Unrecognized configuration class" in str(error):
        return ModelError(
            f"{_name(config)}: transformers has no causal language model for model_type {config.model_type!r}; "
            "awqkit takes decoder-only models"
        )
    return CheckpointError(
        f"{_name(config)}: transformers cannot build the model that config.json describes "
        f"({type(error).__name__}: {gist(error)}); fetch the model again, or try a newer transformers"
    )


def _name(config: Any) -> str:
    return getattr(config, "name_or_path", "") or "this model"


def _needs_trust(where: object) -> CheckpointError:
    return CheckpointError(
        f"{where}: this model runs code of its own (auto_map in config.json); "
        "read that code, then pass --trust-remote-code"
    )


def is_of_transformers(module: nn.Module) -> bool:
    """Whether the module is a model of transformers, which a folder describes better."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def full_model(
    directory: Path, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> nn.Module:
    """The whole model of a full-precision folder in `dtype` on `device`, in eval mode.

    Raises CheckpointError where it cannot be built or lacks a tensor (transformers would make one up), ModelError where
    it is no decoder-only model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(directory, trust_remote_code=trust_remote_code)
    _refuse_encoder_decoder(config)
    try:
        with quiet_transformers():
            own, choices = _class_of_part(config), {}
            if own is None:
                own, choices = AutoModelForCausalLM, {"trust_remote_code": trust_remote_code}
            model, found = own.from_pretrained(
                directory, config=config, dtype=dtype, output_loading_info=True, **choices
            )
    except Exception as error:  # transformers and a model's own code raise many kinds
        raise _not_built(config, error) from error
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{directory}: of the tensors that config.json asks for, {missing[0]} is missing{more}; "
            "fetch the weights and config.json again, both from one place"
        )
    return model.to(device).eval()


def sample_tokens(
    model: nn.Module, rows: torch.Tensor, num_tokens: int, seed: int, step: Callable[[int], None]
) -> torch.Tensor:
    """`rows` `[rows, tokens]` int64 with `num_tokens` more, drawn from the model's own distribution.

    No end of text, temperature or cut of the distribution: what the checkpoint's generation config says is left aside.
    seed: of the draw. step(done): called after each token.
    """
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    chances = iter(draw_chances(num_tokens, len(rows), seed))

    class Draw(LogitsProcessor):
        """One token a row: faster than torch's multinomial, on its own seed."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            drawn = drawn_tokens(scores, next(chances).to(scores.device))
            step(input_ids.shape[1] + 1 - rows.shape[1])
            return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)

    usual, model.generation_config = model.generation_config, GenerationConfig()
    greedy = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, use_cache=True, pad_token_id=0)
    try:
        with quiet_transformers(), torch.no_grad():
            return model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                generation_config=greedy,
                logits_processor=LogitsProcessorList([Draw()]),
            )
    finally:
        model.generation_config = usual


def fixed_cache(model: nn.Module, positions: int) -> Any:
    """A cache for `model` with room for `positions` tokens from the start, written in place, with every token in it.

    Raises ModelError where a window of the model's is shorter, and whatever transformers does where it has none.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=positions)
    kept = min((getattr(layer, "max_cache_len", positions) for layer in cache.layers), default=positions)
    if kept < positions:  # what leaves a window is decided on the host
        raise ModelError(f"it looks back at {kept} tokens, and {positions} are written")
    return cache


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no notes from transformers inside; the CLI draws its own."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made inside are on meta at once; buffers (rotary frequencies, masks) are computed as usual.

    torch's own `device("meta")` would leave the non-persistent buffers, which no checkpoint holds, without values.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
            parameter._is_hf_initialized = True  # no random numbers for what has no values, which took most of the time
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _ViewsStayViews(TorchFunctionMode):
    """Inside, `contiguous` copies nothing."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return args[0] if function is torch.Tensor.contiguous else function(*args, **(kwargs or {}))


def as_saved(model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    """Name on disk, as transformers saves the model -> the parameter or buffer that it is of, and the view of it.

    Found by running transformers' own conversion on tensors without values. What it does not only cut, transpose or
    rename is left out, and so is everything where this transformers has no such conversion.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    empty = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in named.items()}
    owner = {value.untyped_storage()._cdata: name for name, value in empty.items()}
    try:
        with torch.no_grad(), _ViewsStayViews():
            saved = revert_weight_conversion(model, empty)
    except Exception:  # a conversion that needs values, or a model of another library: the plain names will have to do
        return {}
    found = {disk: (owner.get(view.untyped_storage()._cdata), view) for disk, view in saved.items()}
    return {disk: (name, view) for disk, (name, view) in found.items() if name is not None}


def library_versions() -> dict[str, str]:
    """Versions of torch and transformers."""
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def finish_loading(model: nn.Module, directory: Path) -> nn.Module:
    """A model whose tensors were filled in by hand, ready for `generate`: generation config read, eval mode."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def write_dequantized_gguf(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file to a bfloat16 checkpoint folder with its tokenizer, by transformers' own reader.

    Raises CheckpointError where the packages that reader needs are missing.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # since 5.20 the default keeps the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # the reader draws a bar of its own that no setting of transformers hides
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise CheckpointError(
            f"reading {gguf.name} needs gguf and accelerate: pip install 'awqkit[smollm2]' ({gist(error)})"
        ) from error
    model.hf_quantizer = None  # it is a plain model now, but save_pretrained would refuse it as quantized
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
