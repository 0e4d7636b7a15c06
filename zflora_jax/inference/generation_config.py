"""The settings of generation as one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypedDict

from zflora_jax.core.fields import check_types, override, require
from zflora_jax.inference.sampling import Sampler


@dataclass(frozen=True)
class GenerationConfig:
    """How text is generated from a model. These two are the same:

        generate(model, texts, GenerationConfig(max_new_tokens=32, sampler=Sampler(0.7)))
        generate(model, texts, max_new_tokens=32, sampler=Sampler(0.7))

    Attributes:
      max_new_tokens: most tokens that an answer may have, its stop token included.
      sampler: how each token is chosen; None: the likeliest (greedy).
      seed: of what is drawn.
      batch_size: prompts that are decoded together. It changes the speed, not the answers (up to
        float rounding of the matrix products).
      num_beams: above 1: beam search (see `inference.beam`), which draws nothing and so takes no
        sampler of a temperature above 0. A batch then decodes batch_size * num_beams rows.
      stop_token_ids: ids that end an answer; None: the model's own (eos_token_ids, and with a chat
        template the end of a turn); empty: nothing ends it but max_new_tokens.

    Raises:
      ConfigError: a value that is not allowed, by name.
    """

    max_new_tokens: int = 64
    sampler: Sampler | None = None
    seed: int = 0
    batch_size: int = 16
    num_beams: int = 1
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name}={value}: must be at least 1.")
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be from 0 to 2**32 - 1.")
        require(
            self.num_beams >= 1,
            f"num_beams={self.num_beams}: must be at least 1 (1 is no beam search).",
        )
        temperature = self.sampler.temperature if self.sampler else 0
        require(
            self.num_beams == 1 or temperature == 0,
            f"num_beams={self.num_beams} with a sampler of temperature {temperature}: beam search"
            " draws nothing. Leave the sampler out, or set num_beams=1.",
        )

    def stopping_at(self, ids: Iterable[int]) -> GenerationConfig:
        """This config, with `ids` for stop_token_ids where it leaves them to the model."""
        if self.stop_token_ids is not None:
            return self
        return replace(self, stop_token_ids=tuple(ids))


class GenerationSettings(TypedDict, total=False):
    """The fields of GenerationConfig as keywords of the functions that generate."""

    max_new_tokens: int
    sampler: Sampler | None
    seed: int
    batch_size: int
    num_beams: int
    stop_token_ids: tuple[int, ...] | list[int] | None


def generation_config(
    config: GenerationConfig | None, settings: GenerationSettings
) -> GenerationConfig:
    """`config` with `settings` in place of its fields.

    Args:
      config: None for the defaults.
      settings: keywords of a caller; ConfigError for one that is no field.
    """
    return override(config or GenerationConfig(), dict(settings))
