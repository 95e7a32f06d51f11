"""Training data: reads files into records, encodes them as ids and labels, and packs batches."""

from qwen_jax.chat.examples import LOSS_ON, chat_example, sft_example, text_example, text_of

__all__ = ["LOSS_ON", "chat_example", "sft_example", "text_example", "text_of"]
