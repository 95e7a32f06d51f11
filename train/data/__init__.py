"""Training data: files become records, records ids and labels, and those rows and batches."""

from train.data.examples import LOSS_ON, chat_example, sft_example, text_example, text_of

__all__ = ["LOSS_ON", "chat_example", "sft_example", "text_example", "text_of"]
