"""Trains and writes small T5 tokenizers, for train_emoji_flow.py and the golden flow models.

Made with Python 3.11, tokenizers 0.23.3.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def train_t5_tokenizer(prompts, size):
    """A tokenizer that is T5's but for a smaller vocabulary, no sentinels and no NFKC tables."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        prompts,
        trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=special,
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    # Which of some nearly equal scores a token has varies from run to run; this gives them out in
    # the tokens' order.
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"][len(special) :]
    tokens = [
        token for token, score in sorted(vocab, key=lambda entry: (-round(entry[1], 2), entry[0]))
    ]
    scores = sorted((round(score, 6) for _, score in vocab), reverse=True)
    vocab = [(token, 0.0) for token in special] + list(zip(tokens, scores))
    tokenizer.model = models.Unigram(vocab, special.index("<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    return tokenizer


def write_t5_tokenizer(folder, tokenizer, length=512):
    """Writes tokenizer.json and a tokenizer_config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n")
    config = {
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": 0,
        "legacy": True,
        "model_max_length": length,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
