"""The policy: a HF causal LM with fp32 parameters, scored through a chunked head, and its frozen reference."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_posttrain import attention, scoring
from lit_posttrain.blocks import compile_layers, recompute_elementwise
from lit_posttrain.dropout import disable_dropout
from lit_posttrain.functional.log_probs import TokenLogProbs
from lit_posttrain.kept_prompts import KeptPrompts
from lit_posttrain.model_files import model_folder
from lit_posttrain.precision import ComputeDtype, ComputeView, resolve_dtype
from lit_posttrain.stash import Stash
from lit_posttrain.types import Sequences


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (2106.09685) over a frozen base, trained in fp32.

    Args:
        r: Rank of each adapter.
        alpha: The adapter's output is scaled by ``alpha / r``.
        target_modules: ``all-linear`` (every linear layer but the vocabulary head) or names of modules.
    """

    r: int = 16
    alpha: int = 32
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Which network is trained and how its forward passes compute.

    Args:
        model: Folder of a HF causal LM, or its name on the hub.
        tokenizer: Folder or hub name of the tokenizer; the model's own by default.
        compute_dtype: What forward and backward passes compute in. Parameters, optimizer and checkpoints stay fp32.
            ``auto`` is bfloat16 where the hardware multiplies it and float32 elsewhere.
        lora: Train low-rank adapters instead of all weights.
        gradient_checkpointing: Recompute each block's activations in backward: less memory, about a fifth slower.
        recompute_elementwise: Keep no activations that are cheap to compute again in backward (norms, what stands
            between an MLP's products): the same numbers, less memory, a little slower. Null does so on CPUs, where
            what is kept also lies side by side. Blocks that are recomputed as a whole, or compiled, go without.
        compile_layers: Compile each decoder layer for scoring and training (``torch.compile``): the first step then
            takes longer; whether later ones are faster depends on the machine. On a CPU it needs a C++ compiler.
        revision: Commit, branch or tag of a hub model.
    """

    model: str
    tokenizer: str | None = None
    compute_dtype: ComputeDtype = "auto"
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    recompute_elementwise: bool | None = None
    compile_layers: bool = False
    revision: str | None = None


def load_tokenizer(config: PolicyConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the policy.

    Raises:
        ValueError: The folder or hub name holds none.
    """
    key = "model.init_args.policy.tokenizer" if config.tokenizer else "model.init_args.policy.model"
    folder = model_folder(config.tokenizer or config.model, key, revision=config.revision, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: no tokenizer in {folder} ({error})") from error


def load_network(model: str, key: str = "model.init_args.policy.model", revision: str | None = None) -> PreTrainedModel:
    """A HF causal LM in fp32 with every dropout off, in training mode.

    Dropout would make the policy that is scored another than the one that sampled. HF's gradient checkpointing
    works only in training mode, and ``from_pretrained`` returns eval mode, so the mode is set here, explicitly.
    """
    folder = model_folder(model, key, revision=revision, weights=True)
    try:
        network, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{key}: {folder} cannot be loaded as a causal language model ({error})") from error
    if missing := sorted(found["missing_keys"]):
        # from_pretrained would only warn, and go on with random numbers in their place.
        raise ValueError(
            f"{key}: the files in {folder} lack {len(missing)} of the weights of a {type(network).__name__}, "
            f"{missing[0]} among them"
        )
    disable_dropout(network)
    return network.train()


class Policy(nn.Module):
    """One root module around the network, so that one FSDP root and one set of entry points serve every algorithm.

    Call it only through ``forward`` and ``next_logits``: under FSDP2 these gather the parameters.

    Args:
        config: What to load.
    """

    entry_points: tuple[str, ...] = ("next_logits",)
    lora_task = "CAUSAL_LM"

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        network = self.load(config)
        self.stop_token_ids = _stop_token_ids(network)
        self.context_length: int | None = getattr(network.config, "max_position_embeddings", None)
        # Before adapters and the compute view, which copy the setting.
        self.shares_prompts = scoring.share_prompts(network)
        self.window = attention.window_of(network)
        self.model: nn.Module = add_lora(network, config.lora, self.lora_task) if config.lora else network
        if config.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
            if config.lora:
                network.enable_input_require_grads()
        self.view: ComputeView | None = None  # not a module: out of state_dict
        self.compute_dtype: torch.dtype | None = None
        self.stash: Stash | None = None
        self.kept = KeptPrompts()
        self.gathers = False  # whether backward may add to gradients itself

    def load(self, config: PolicyConfig) -> PreTrainedModel:
        """The HF network, seen to be one that can be sampled and scored."""
        network = load_network(config.model, revision=config.revision)
        scoring.check_network(network)
        return network

    def build_view(self, device: torch.device, *, sharded: bool) -> None:
        """Make the compute view once the parameters are on their device; FSDP casts by itself, so it needs none."""
        self.compute_dtype = resolve_dtype(self.config.compute_dtype, device)
        view_dtype = torch.float32 if sharded else self.compute_dtype
        self.view = ComputeView(self.model, view_dtype)
        self.gathers = device.type == "cpu" and not sharded
        # Sharded passes are collectives, and what a further pass costs an accelerator is not measured.
        plain = not (sharded or self.config.compile_layers or self.config.gradient_checkpointing)
        self.kept.able = (plain and device.type == "cpu") if self.shares_prompts else None
        if self.config.compile_layers:
            compile_layers(causal_lm(self.view.module), device)
            return
        wanted = self.config.recompute_elementwise
        if (device.type == "cpu" if wanted is None else wanted) and not self.config.gradient_checkpointing:
            self.stash = recompute_elementwise(causal_lm(self.view.module).base_model)

    def sync(self) -> None:
        """Re-make the compute view; call after every change of the parameters."""
        self._view().sync()
        self.kept.forget()
        if self.stash is not None:
            self.stash.release()

    def forward(
        self,
        sequences: Sequences,
        mask: Bool[Tensor, "b t"],
        temperature: float,
        *,
        adapters: bool = True,
        **entropy: bool,
    ) -> TokenLogProbs:
        """Log p(token i+1 | tokens up to i) at ``temperature`` where ``mask`` is True, 0 elsewhere; fp32 ``[b, t]``.

        Rows of one prompt compute it once, where the architecture allows. Only masked positions reach the vocabulary
        head. ``entropy``: as :func:`lit_posttrain.scoring.log_probs`.
        """
        network = causal_lm(self._view().module)
        packed = self.packs(int(sequences.lengths.max()))
        with _adapters(network, adapters):
            read = partial(self.kept.read, variant=adapters)
            return scoring.log_probs(network, sequences, mask, temperature, packed=packed, read=read, **entropy)

    def packs(self, longest: int) -> bool:
        """Whether sequences of up to so many tokens go through the network in packed rows; says so where not."""
        if not self.shares_prompts or self.window is None or longest <= self.window:
            return self.shares_prompts
        warnings.warn(
            f"{type(causal_lm(self.model)).__name__} has a sliding window of {self.window} tokens: rows with a longer "
            "sequence are padded instead of packed, which is slower",
            stacklevel=2,
        )
        return False

    def next_logits(
        self,
        ids: Int[Tensor, "b n"],
        positions: Int[Tensor, "b n"],
        attention_mask: Int[Tensor, "b m"],
        cache: Any,
    ) -> Float[Tensor, "b v"]:
        """fp32 logits of the token after the last column; ``cache`` (a HF cache) grows by ``n`` columns in place.

        Only inside ``decoding()``.
        """
        network = causal_lm(self._view().module)
        assert not network.training, "HF's gradient checkpointing would throw the cache away: enter decoding() first"
        output = network(
            input_ids=ids,
            position_ids=positions,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Evaluation mode inside: in training mode HF's gradient checkpointing drops the cache and only warns."""
        training = [m for m in self._view().module.modules() if m.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and fp32 parameters that the optimizer owns."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def saved_with_adapters(self) -> set[str]:
        """Names in a module's ``state_dict`` (as ``policy.``...) that a checkpoint holds where the base is frozen."""
        own = {f"policy.model.{name}" for name, _ in self.trainable()}
        return own | {f"policy.{name}" for name in dict(self.named_buffers(recurse=False))}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def hf_config(self) -> Any:
        """The network's HF config."""
        return causal_lm(self.model).config

    def decode_network(self) -> PreTrainedModel:
        """The HF network that forward passes use, for engines that read its weights."""
        return causal_lm(self._view().module)

    @torch.no_grad()
    def save_pretrained(self, out: str | Path) -> None:
        """Write a HF folder (safetensors, fp32, adapters merged); not for sharded parameters."""
        if self.config.lora is None:
            causal_lm(self.model).save_pretrained(out)
            return
        # Merging in place and undoing it drifts; a copy is merged instead. Its base may be bf16 (the compute view
        # shares it), in which a small adapter would round away.
        copy.deepcopy(self.model).float().merge_and_unload().save_pretrained(out)  # pyright: ignore[reportCallIssue]

    def _view(self) -> ComputeView:
        if self.view is None:
            self.build_view(self.device, sharded=False)
        assert self.view is not None
        return self.view


def add_lora(network: PreTrainedModel, config: LoraConfig, task: str = "CAUSAL_LM") -> nn.Module:
    """Freeze the network and put adapters on it; vocabulary head and embeddings stay as they are.

    Args:
        network: Changed in place.
        config: Rank, scale and targets.
        task: As peft names it; ``SEQ_CLS`` keeps a scalar head trainable, whole.

    Raises:
        ValueError: The target names the head or the embeddings, or no module at all.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        lora_dropout=0.0,
        task_type=task,
    )
    try:
        adapted = get_peft_model(network, peft_config).train()
    except ValueError as error:
        raise ValueError(f"model.init_args.policy.lora: {error}") from error
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer):
        raise ValueError(
            "model.init_args.policy.lora.target_modules: the vocabulary head and the token embeddings cannot carry "
            f"an adapter, but {config.target_modules!r} matches one of them"
        )
    return adapted


@contextmanager
def _adapters(network: PreTrainedModel, enabled: bool) -> Iterator[None]:
    if enabled:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    training = {id(p): p.requires_grad for layer in layers for p in layer.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            for p in layer.parameters():
                p.requires_grad_(training[id(p)])


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The HF network, adapters aside."""
    network = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # pyright: ignore
    assert isinstance(network, PreTrainedModel)
    return network


def _stop_token_ids(network: PreTrainedModel) -> list[int]:
    """Every id that ends a completion, by the generation config, else by the model config."""
    for config in (getattr(network, "generation_config", None), network.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []
