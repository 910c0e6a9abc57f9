"""Build the tokenizer of `nano`: words of the tasks are single tokens, everything else is bytes.

Usage: python scripts/nano_tokenizer.py DIR
"""

import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specontext.tasks.words import vocabulary

SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build(max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level fast tokenizer that encodes any text and puts `<|begin|>` first."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    for word in vocabulary():
        ((piece, _),) = byte_level.pre_tokenize_str(word)
        pieces.append(piece)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    # With `ignore_merges` a whole pre-token in the vocabulary is one token, and any other falls apart into bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", vocab["<|begin|>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


if __name__ == "__main__":
    build(max_length=int(sys.argv[2]) if len(sys.argv) > 2 else 5120).save_pretrained(sys.argv[1])
