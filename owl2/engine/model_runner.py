"""Forward passes over the static cache: decode steps, and prompts.

::

    decode:  token ids (B,), positions (B,) ──► logits (B, V)
    prefill: prompts of any lengths         ──► logits (B, V) after their last tokens

Where the CPU kernels support the model, `backends.cpu` computes the decoder layers. The tokens of
all prompts are then one sequence without padding, text first and images last. Everywhere else, the
model's own forward computes right-padded rows.

Shapes: B sequences, S positions, M tokens in all, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from owl2.engine.backends import cpu
from owl2.engine.kv_cache import StaticKVCache
from owl2.engine.prefix_cache import PromptState
from owl2.model.image_inputs import ntk_options
from owl2.model.modeling import Owl2ForConditionalGeneration


class ModelRunner:
    """Runs a model over the rows of a cache. It reads the weights of the model in place.

    Attributes:
        cache: Rows 0 to B-1 are the sequences of a decode step.
        uses_cpu_kernels: Whether the CPU kernels compute the decoder layers.
    """

    def __init__(self, model: Owl2ForConditionalGeneration) -> None:
        self.model = model
        config = model.config
        self.cache = StaticKVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            model.dtype,
            model.device,
        )
        self.uses_cpu_kernels = cpu.supports(model)

    @property
    def is_stale(self) -> bool:
        """Whether the model was moved to another device or cast to another dtype."""
        layer = self.cache.layers[0]
        return (layer.dtype, layer.device) != (self.model.dtype, self.model.device)

    @torch.no_grad()
    def decode(
        self, tokens: torch.Tensor, positions: torch.Tensor, ntk_alphas: Sequence[float] = ()
    ) -> torch.Tensor:
        """Logits of the next token of each sequence; keys and values go to the cache.

        Args:
            tokens: (B,) ids of text tokens on the model's device.
            positions: (B,) their positions, on the CPU; all before them are filled.
            ntk_alphas: `ntk_alpha` of their prompts.

        Returns:
            (B, V).
        """
        self._check_not_stale()
        length = int(positions.max()) + 1
        self.cache.reserve(len(tokens), length)
        hidden = self.model.model.embed_tokens(tokens)  # (B, D)
        if self.uses_cpu_kernels:
            return self._logits(self._run_layers(hidden, torch.arange(len(tokens)), positions))
        places = positions[:, None].to(tokens.device)  # (B, 1)
        # Shorter rows have a mask; the forward itself masks what comes after a query.
        mask = (torch.arange(length, device=tokens.device) <= places).long()  # (B, length)
        options = ntk_options(self.model.config, ntk_alphas, tokens.device)
        hidden = self._forward(hidden[:, None], 0, places, length, mask, **options)
        return self.model.lm_head(hidden[:, 0])

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[PromptState], images: torch.Tensor | None, first_row: int
    ) -> torch.Tensor:
        """Compute the new tokens of prompts into the rows from `first_row` on.

        Args:
            prompts: Their cached prefixes are copied into the rows. Without CPU kernels, all have
                the same `num_computed_tokens`.
            images: (N, K+1, D) embeddings of their new images, in order.

        Returns:
            (B, V) logits after the last token of each.
        """
        self._check_not_stale()
        self.cache.reserve(first_row + len(prompts), max(prompt.num_tokens for prompt in prompts))
        for row, prompt in enumerate(prompts, first_row):
            if prompt.prefix is not None:
                stop = prompt.num_computed_tokens
                self.cache.write(row, [layer[:, :, :stop] for layer in prompt.prefix])
        compute = self._prefill_packed if self.uses_cpu_kernels else self._prefill_padded
        return compute(prompts, images, first_row)

    def _prefill_packed(
        self, prompts: Sequence[PromptState], images: torch.Tensor | None, first_row: int
    ) -> torch.Tensor:
        lengths = torch.tensor([prompt.num_new_tokens for prompt in prompts])
        rows = torch.arange(first_row, first_row + len(prompts)).repeat_interleave(lengths)  # (M,)
        positions = torch.cat(
            [torch.arange(prompt.num_computed_tokens, prompt.num_tokens) for prompt in prompts]
        )
        ids = torch.tensor([id_ for p in prompts for id_ in p.prompt.ids[p.num_computed_tokens :]])
        is_image = ids == self.model.config.image_token_id  # (M,)
        order = is_image.int().argsort(stable=True)  # text first
        hidden = self.model.model.embed_tokens(ids[~is_image])
        if images is not None:
            hidden = torch.cat([hidden, images.flatten(0, 1)])
        last = order.argsort()[lengths.cumsum(0) - 1]
        hidden = self._run_layers(hidden, rows[order], positions[order], int(is_image.sum()))
        return self._logits(hidden[last])

    def _prefill_padded(
        self, prompts: Sequence[PromptState], images: torch.Tensor | None, first_row: int
    ) -> torch.Tensor:
        model, device = self.model, self.model.device
        start = prompts[0].num_computed_tokens
        lengths = [prompt.num_new_tokens for prompt in prompts]
        width = max(lengths)
        rows = [[*p.prompt.ids[start:], *[0] * (width - p.num_new_tokens)] for p in prompts]
        ids = torch.tensor(rows, device=device)  # (B, S)
        # Padding is on the right, where causal attention hides it from the prompt.
        positions = torch.arange(start, start + width, device=device).expand(len(prompts), -1)
        alphas = [prompt.ntk_alpha for prompt in prompts]
        options: dict[str, Any] = ntk_options(model.config, alphas, device)
        if images is not None:
            options["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        embeddings = model.model.embed(ids, images)
        hidden = self._forward(embeddings, first_row, positions, start + width, None, **options)
        last = torch.tensor(lengths, device=device) - 1
        return model.lm_head(hidden[torch.arange(len(prompts), device=device), last])

    def _forward(
        self,
        embeddings: torch.Tensor,
        first_row: int,
        positions: torch.Tensor,
        length: int,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> torch.Tensor:
        """(B, S, D) embeddings through the model's own forward, into the rows of the cache."""
        hidden: torch.Tensor = self.model.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache.view(first_row, positions, length),
            use_cache=True,
            **options,
        ).last_hidden_state
        return hidden

    def _run_layers(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        num_visual: int = 0,
    ) -> torch.Tensor:
        """(M, D) embeddings, the last `num_visual` of images, through the CPU kernels."""
        decoder: Any = self.model.model
        cos, sin = decoder.rotary_emb(hidden[None], positions[None])  # (1, M, d)
        tokens = cpu.TokenPositions(rows, positions, cos[0], sin[0], num_visual)
        return cpu.run_layers(decoder.layers, hidden, self.cache.layers, tokens)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return cpu.linear(self.model.lm_head, cpu.rms_norm(self.model.model.norm, hidden))

    def _check_not_stale(self) -> None:
        """The kernels would access memory of another element size."""
        if self.is_stale:
            raise RuntimeError("the model was moved or cast while it generated an answer")
