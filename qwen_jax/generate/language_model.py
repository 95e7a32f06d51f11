"""`LanguageModel`, the interface for users: a loaded model with logits, generation and chat.

It checks arguments, turns texts and host arrays into the arrays that `decode.py` takes, and enters
the mesh. It knows nothing of the command line.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from qwen_jax import chat, meshes
from qwen_jax.attention import Attend
from qwen_jax.chat import DEFAULT_SYSTEM, History
from qwen_jax.chat.tokenizer import TextStream
from qwen_jax.decoding import choosing, decode, inputs, sampling
from qwen_jax.generate import completion, keywords
from qwen_jax.generate.description import BASE_NOTE, Description
from qwen_jax.meshes import moves, sharding
from qwen_jax.model import Decoder, rope
from qwen_jax.runtime import texts, values


@dataclasses.dataclass(frozen=True)
class LanguageModel(Description):
    """A model ready to run: its description, and its weights on a mesh. Made by `load`.

    decoder: the weights.
    mesh: the mesh that holds them.
    attend: the attention function.
    cache_dtype: the dtype of the KV cache, "int8" or "int8_asymmetric"; None for the weights'
        dtype.
    """

    decoder: Decoder
    mesh: Mesh
    attend: Attend
    cache_dtype: str | None

    @keywords.explained
    def logits(
        self,
        tokens: inputs.Tokens,
        mask: ArrayLike | None = None,
        ntk_alpha: ArrayLike | None = None,
    ) -> jax.Array:
        """Compute the logits of every token, float32 [B, T, V], in one forward pass.

        tokens: int [B, T], or prompts of unequal length, which are padded on the left to the
            longest.
        mask: int [B, T], 1 = real, for prompts that are left-padded already. Logits at padding are
            meaningless.
        ntk_alpha: a float or [B]; None: from each prompt's length if the model has dynamic NTK, or
            1.

        Raises ValueError for ids out of range or a mask that is not left-padded.
        """
        tokens, lengths = inputs.rows(tokens, mask, vocab_size=self.config.vocab_size)
        frequencies = self._frequencies(lengths, ntk_alpha)
        with meshes.entered(self.mesh):
            batch, arrays = len(tokens), (tokens, lengths, frequencies)
            tokens, lengths, frequencies = (self._whole_shards(x) for x in arrays)
            start = moves.place((tokens.shape[1] - lengths).astype(np.int32), "B")
            positions, segments = decode.positions(start, jnp.int32(0), length=tokens.shape[1])
            x = self.decoder.embed(moves.place(tokens, "BT"))
            rates = moves.place(frequencies, "BH")
            output = self.decoder(
                x, positions, segments=segments, frequencies=rates, attend=self.attend
            )
            logits = self.decoder.logits(output.last)
            if len(tokens) != batch:  # rows that the mesh does not divide: every device keeps all
                logits = jax.reshard(logits, P(None, None, sharding.spec("BTV")[2]))[:batch]
        return moves.handed_over(logits)

    @keywords.explained
    def generate(
        self,
        tokens: inputs.Tokens,
        mask: ArrayLike | None = None,
        max_new_tokens: int = 512,
        sampler: sampling.Sampler | None = None,
        stop: inputs.Stops = (),
        seed: int | Sequence[int] = 0,
        ntk: str = "prompt",
        ntk_alpha: ArrayLike | None = None,
    ) -> np.ndarray:
        """Continue prompts of ids; returns int32 [B, max_new_tokens], with pad ids after a stop.

        tokens, mask, ntk_alpha: as in `logits`. Each prompt's result is the same as if it ran
            alone. (`generate_text` takes texts.)
        sampler: a `Greedy` or a `Nucleus`; None is `Greedy()`.
        stop: ids, or sequences of ids, that end a result; the stop itself is returned.
        seed: one for all prompts, or one for each. A result's random numbers depend on its seed
            alone, so equal prompts with one seed give equal results.
        ntk: dynamic NTK computes alpha from the length of the "prompt", as the original code does,
            or from the "total" of prompt and new tokens.

        Raises ValueError for an empty prompt, ids out of range, more than `max_length` tokens, or
        logits that are NaN or infinite or leave no id to choose.
        """
        parts = list(
            self.stream(
                tokens,
                mask,
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                stop=stop,
                seed=seed,
                ntk=ntk,
                ntk_alpha=ntk_alpha,
                at_once=decode.STRIDE,
            )
        )
        made = np.concatenate(parts, axis=1)
        missing = int(max_new_tokens) - made.shape[1]
        return np.pad(made, ((0, 0), (0, missing)), constant_values=self.pad_id)

    generate_text = completion.generate_text

    @keywords.explained
    def stream(
        self,
        tokens: inputs.Tokens,
        mask: ArrayLike | None = None,
        max_new_tokens: int = 512,
        sampler: sampling.Sampler | None = None,
        stop: inputs.Stops = (),
        seed: int | Sequence[int] = 0,
        ntk: str = "prompt",
        ntk_alpha: ArrayLike | None = None,
        at_once: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the tokens of `generate` as they are generated, int32 [B, n].

        at_once: the largest n of all arrays but the first, which has n = 1; None means 1 on a CPU
            and 8 elsewhere.

        The other arguments are as in `generate`. Ends when every prompt's result has met a stop.
        """
        tokens, lengths = inputs.rows(tokens, mask, vocab_size=self.config.vocab_size)
        max_new_tokens = values.whole("max_new_tokens", max_new_tokens, least=1)
        at_once = None if at_once is None else values.whole("at_once", at_once, least=1)
        self.room(int(lengths.max()), max_new_tokens)
        values.choice("ntk", ntk, allowed=("prompt", "total"))
        chosen = sampling.Greedy() if sampler is None else sampler
        values.instance("sampler", chosen, kind=(sampling.Greedy, sampling.Nucleus)).check()
        # All settings are float32, so that 1 and 1.0 share one compiled program.
        chosen = jax.tree.map(lambda x: jnp.float32(float(x)), chosen)
        counted = lengths + (max_new_tokens if ntk == "total" else 0)
        frequencies = self._frequencies(counted, ntk_alpha)
        seeds = inputs.seeds(seed, len(tokens))
        rules = choosing.make_rules(
            self.known_ids(), inputs.stops(stop, self.config.vocab_size), pad=self.pad_id
        )
        return self._run(
            tokens,
            lengths,
            frequencies=frequencies,
            seeds=seeds,
            rules=rules,
            sampler=chosen,
            new=max_new_tokens,
            at_once=at_once,
        )

    def _run(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        *,
        frequencies: np.ndarray,
        seeds: np.ndarray,
        rules: choosing.Rules,
        sampler: sampling.Sampler,
        new: int,
        at_once: int | None,
    ) -> Iterator[np.ndarray]:
        batch = len(tokens)
        tokens, lengths, frequencies, seeds = (
            self._whole_shards(x) for x in (tokens, lengths, frequencies, seeds)
        )
        how = {"rules": rules, "sampler": sampler, "attend": self.attend, "new": new}
        rows = {"lengths": lengths, "frequencies": frequencies, "seeds": seeds}
        with meshes.entered(self.mesh):
            state, cache = decode.prefill(
                self.decoder, tokens, **rows, **how, cache_dtype=self.cache_dtype
            )
        at_once = at_once or (1 if jax.default_backend() == "cpu" else 8)
        steps = decode.decode(self.decoder, state, cache=cache, **how, at_once=at_once)
        while True:
            # The mesh is in force while we compute, never while the caller has control.
            with meshes.entered(self.mesh):
                part = next(steps, None)
            if part is None:
                return
            yield part[:batch]

    @keywords.explained
    def chat(
        self,
        query: str,
        history: History | None = (),
        system: str = DEFAULT_SYSTEM,
        sampler: sampling.Sampler | None = None,
        max_new_tokens: int | None = None,
        stop: inputs.Stops | None = None,
        seed: int = 0,
        max_window_size: int | None = None,
    ) -> tuple[str, list[Any]]:
        """Answer a query in a chat; returns the reply, and the history with this turn appended.

        Arguments that are None come from the checkpoint's generation_config.

        history: pairs (query, reply), or messages {"role": ..., "content": ...}, whose system
            message replaces `system`. It is returned in the same form.
        system: the text of the system message.
        stop: ids or sequences of ids that end the reply.
        max_window_size: the newest turns are kept while they and the system message have fewer
            tokens.

        Raises ValueError that names an argument which is not text.
        """
        ids = self._reply(
            query,
            history,
            system=system,
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            max_window_size=max_window_size,
        )
        made = [i for part in ids for i in part]
        reply = chat.decode_reply(self.need_tokenizer(), made, chat_format="chatml")
        return reply, chat.with_turn(history, query, reply=reply)

    @keywords.explained
    def chat_stream(
        self,
        query: str,
        history: History | None = (),
        system: str = DEFAULT_SYSTEM,
        sampler: sampling.Sampler | None = None,
        max_new_tokens: int | None = None,
        stop: inputs.Stops | None = None,
        seed: int = 0,
        max_window_size: int | None = None,
    ) -> Iterator[str]:
        """Yield the whole reply so far each time it grows, never with an incomplete character.

        The arguments are as in `chat`, and are checked at the call, not at the first item.
        """
        ids = self._reply(
            query,
            history,
            system=system,
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            max_window_size=max_window_size,
        )
        return self._growing(ids)

    def _growing(self, ids: Iterator[list[int]]) -> Iterator[str]:
        text, stream = "", TextStream(self.need_tokenizer(), skip_special_tokens=True)
        for part in ids:
            text += stream.push(part)
            yield text
        if rest := stream.flush():
            yield text + rest

    def _reply(
        self,
        query: str,
        history: History | None,
        *,
        system: str,
        sampler: sampling.Sampler | None,
        max_new_tokens: int | None,
        stop: inputs.Stops | None,
        seed: int,
        max_window_size: int | None,
    ) -> Iterator[list[int]]:
        """Check the arguments of `chat`; return an iterator of the reply's ids, without a stop."""
        if isinstance(query, list | tuple):
            raise ValueError(
                f"query must be text (str), got {texts.described(query)}: of messages, give the "
                "text of the last one, and as history those before it"
            )
        tokenizer = self.need_tokenizer()
        if self.is_base:
            # Names the line that calls `chat`, past the decorator that explains keywords.
            warnings.warn(BASE_NOTE, stacklevel=4)
        if max_window_size is None:
            max_window_size = self.generation_config.max_window_size
        system, pairs = chat.turns_of(history, system)
        _, prompt = chat.make_context(tokenizer, query, pairs, system, max_window_size)
        stops = self.chat_stops() if stop is None else inputs.stops(stop, self.config.vocab_size)
        parts = self.stream(
            np.array([prompt]),
            max_new_tokens=self.room(len(prompt), max_new_tokens),
            sampler=self.generation_config.sampler if sampler is None else sampler,
            stop=stops,
            seed=seed,
        )
        return chat.until_stop((part[0] for part in parts), stops)

    def _frequencies(self, lengths: np.ndarray, ntk_alpha: ArrayLike | None) -> np.ndarray:
        """Compute RoPE frequencies, float32 [B, H/2], from sequence lengths or a given alpha."""
        scheme = rope.from_config(self.config)
        if ntk_alpha is None:
            return scheme.frequencies(scheme.alpha(lengths))
        return scheme.frequencies(inputs.alphas(ntk_alpha, len(lengths)))

    def _whole_shards(self, rows: np.ndarray) -> np.ndarray:
        """Repeat rows [B, ...] until the mesh divides B; callers drop the results of the copies."""
        shards = math.prod(sharding.axis_sizes(self.mesh)[axis] for axis in sharding.BATCH)
        return np.resize(rows, (-(-len(rows) // shards) * shards, *rows.shape[1:]))
