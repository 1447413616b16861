"""Tiny text encoders of the kinds that published bases have, with a tokenizer of a few words."""

import json

import torch

KINDS = {
    "wan": "UMT5EncoderModel",
    "wan_animate": "UMT5EncoderModel",
    "wan_vace": "UMT5EncoderModel",
    "cogvideox": "T5EncoderModel",
    "motion_unet": "CLIPTextModel",
    "latte": "T5EncoderModel",
    "hunyuan_video": "LlamaModel",
}
"""Of families that take captions."""
SECOND = {"hunyuan_video": ("CLIPTextModel", 6)}
"""Second encoder of a family, and its width."""
WORDS = ["<pad>", "</s>", "<unk>", "a", "person", "dances", "in", "the", "rain", "walks", "home"]


def pipeline(folder, family):
    """Encoders and tokenizers of a family in a folder; returns them by their parts' names."""
    import transformers

    made = {"text_encoder": encoder(folder, KINDS[family])}
    if family in SECOND:
        kind, width = SECOND[family]
        made["text_encoder_2"] = encoder(folder, kind, width, "_2")
    names = [name.replace("text_encoder", "tokenizer") for name in made]
    return made | {name: transformers.AutoTokenizer.from_pretrained(folder / name) for name in names}


def tokenizer(folder, most=512):
    """A tokenizer of WORDS, as a folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=most
    )
    made.save_pretrained(folder)


def encoder(folder, kind="UMT5EncoderModel", width=8, end=""):
    """`text_encoder/` and `tokenizer/` in a folder; returns the encoder. end: of both names."""
    import transformers

    torch.manual_seed(1)
    words = folder / f"tokenizer{end}"
    if kind == "CLIPTextModel":
        tokenizer(words, 77)
        sizes = transformers.CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
    elif kind == "LlamaModel":
        tokenizer(words)  # HunyuanVideo's template is 99 tokens of it, of which 95 are cut off
        sizes = transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
    else:
        tokenizer(words)
        config = transformers.UMT5Config if kind == "UMT5EncoderModel" else transformers.T5Config
        sizes = config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = getattr(transformers, kind)(sizes).eval()
    model.save_pretrained(folder / f"text_encoder{end}")
    assert json.loads((folder / f"text_encoder{end}" / "config.json").read_text())["architectures"] == [kind]
    return model
