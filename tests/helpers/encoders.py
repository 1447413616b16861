"""Tiny text encoders of the kinds that published bases have, with a tokenizer of a few words."""

import json

import torch

KINDS = {
    "wan": "UMT5EncoderModel",
    "cogvideox": "T5EncoderModel",
    "motion_unet": "CLIPTextModel",
    "latte": "T5EncoderModel",
}
"""Of families that take captions."""
WORDS = ["<pad>", "</s>", "<unk>", "a", "person", "dances", "in", "the", "rain", "walks", "home"]


def tokenizer(folder, most=512):
    """A tokenizer of WORDS, as its folder in a pipeline."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=most
    )
    made.save_pretrained(folder / "tokenizer")


def encoder(folder, kind="UMT5EncoderModel", width=8):
    """`text_encoder/` and `tokenizer/` in a folder; returns the encoder."""
    import transformers

    torch.manual_seed(1)
    if kind == "CLIPTextModel":
        tokenizer(folder, 77)
        sizes = transformers.CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
    else:
        tokenizer(folder)
        config = transformers.UMT5Config if kind == "UMT5EncoderModel" else transformers.T5Config
        sizes = config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = getattr(transformers, kind)(sizes).eval()
    model.save_pretrained(folder / "text_encoder")
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["architectures"] == [kind]
    return model
