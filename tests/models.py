"""Tiny models built from configs, one a architecture, and fake fine-tunes of them. A test over `ARCHITECTURES` covers
an architecture from the day it is added."""

import copy
import json
from typing import NamedTuple

import torch
import transformers as T
from torch import nn

from peft_tint._structure import find_final_norm, find_head, plain_modules

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 1, 1]])}
TEXT_WITH_END = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 1], [20, 21, 22, 23, 24, 1]])}
TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **TOKENS}
BART = {
    "vocab_size": 64,
    "d_model": 16,
    "max_position_embeddings": 32,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
}
LLAMA = {"vocab_size": 64, "num_key_value_heads": 1, **SMALL}  # grouped-query attention
VISION = {"image_size": 32, "patch_size": 8, **SMALL}
CLIP = {
    "projection_dim": 8,
    "text_config": {"vocab_size": 64, "eos_token_id": 1, **SMALL},
    "vision_config": VISION,
}


def per_task(base):
    """The names of the modules with a copy for each task by default."""
    modules = dict(plain_modules(base))
    return find_head(base, modules) or find_final_norm(base, modules)


class Architecture(NamedTuple):
    """`has_head`: each task has a head of its own. `classes`: of the experts, whose heads may differ in size."""

    make: object
    inputs: dict
    has_head: bool = True
    classes: tuple = (2, 5, 3)

    def build(self, seed=0, **settings):
        """The model with weights large enough for every part of it to show in the output."""
        torch.manual_seed(seed)
        model = self.make(**settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        return model.eval()


class Recurrent(nn.Module):
    """A plain module of PyTorch's recurrent layers, which hold their weights twice."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, pixel_values):
        x, _ = self.gru(self.lstm(pixel_values.mean(3).mT)[0])
        return T.modeling_outputs.ImageClassifierOutput(logits=self.fc(self.cell(x[:, 0], x[:, -1])))


class ConvNet(nn.Module):
    """A plain module: convolutions, a norm, a bare parameter and a head, with no config."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.body = Scale(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=4, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, pixel_values):
        x = self.conv2(self.body(self.norm(self.conv1(pixel_values)).relu()))
        return T.modeling_outputs.ImageClassifierOutput(logits=self.fc(x.mean((2, 3))))


class PlainTransformer(nn.Module):
    """A vision transformer as timm writes it: cls token and positions are parameters of the model itself."""

    def __init__(self):
        super().__init__()
        self.cls_token, self.positions = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 17, 16))
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.block(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return T.modeling_outputs.ImageClassifierOutput(logits=self.fc(x[:, 0]))


class Holders(nn.Module):
    """Parameters that are read from lists and dicts, and weights that are computed from parameters."""

    def __init__(self):
        super().__init__()
        self.prompts = nn.ParameterList([torch.randn(3, 8), torch.randn(3, 8)])
        self.scales = nn.ParameterDict({"first": torch.ones(8), "second": torch.randn(8)})
        self.nested = nn.ModuleList([nn.ParameterList([torch.randn(8)]), nn.Linear(8, 8)])
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.read = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.block = nn.Module()
        self.block.inner = Scales()
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([*self.prompts, x]) * self.scales["first"] + self.scales["second"]
        x = self.nested[1](x) + self.nested[0][0]
        x = self.block.inner(self.normed(x)) @ self.read.weight  # a parametrized module that is not called
        return T.modeling_outputs.ImageClassifierOutput(logits=self.fc(x))


class Shift(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x + self.by


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(8), torch.ones(8)])
        self.shift = nn.Parameter(torch.zeros(8))
        nn.utils.parametrize.register_parametrization(self, "shift", Shift())

    def forward(self, x):
        for scale in self.scales:
            x = x.tanh() * scale
        return x + self.shift


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return x * self.scale


def transformers_model(model_class, config_class, **settings):
    return lambda **more: model_class(config_class(**{**settings, **more}))


ARCHITECTURES = {
    "bert": Architecture(
        transformers_model(T.BertForSequenceClassification, T.BertConfig, vocab_size=64, **SMALL), IDS
    ),
    "roberta": Architecture(
        transformers_model(T.RobertaForSequenceClassification, T.RobertaConfig, vocab_size=64, **SMALL), IDS
    ),
    "distilbert": Architecture(
        transformers_model(
            T.DistilBertForSequenceClassification,
            T.DistilBertConfig,
            vocab_size=64,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
        ),
        IDS,
    ),
    "bert_mlm": Architecture(
        transformers_model(T.BertForMaskedLM, T.BertConfig, vocab_size=64, **SMALL), IDS, has_head=False
    ),
    "vit": Architecture(
        transformers_model(T.ViTForImageClassification, T.ViTConfig, image_size=32, patch_size=8, **SMALL), IMAGE
    ),
    "clip_vision": Architecture(
        transformers_model(T.CLIPVisionModelWithProjection, T.CLIPVisionConfig, image_size=32, patch_size=8, **SMALL),
        IMAGE,
        has_head=False,
    ),
    "dinov2": Architecture(
        transformers_model(T.Dinov2ForImageClassification, T.Dinov2Config, image_size=32, patch_size=8, **SMALL), IMAGE
    ),
    "t5": Architecture(
        transformers_model(T.T5ForConditionalGeneration, T.T5Config, **T5),
        {**IDS, "decoder_input_ids": IDS["input_ids"][:, :3]},
        has_head=False,
    ),
    "t5_classifier": Architecture(
        transformers_model(T.T5ForSequenceClassification, T.T5Config, eos_token_id=1, **T5),
        TEXT_WITH_END,
    ),
    "deberta_v2": Architecture(
        transformers_model(
            T.DebertaV2ForSequenceClassification,
            T.DebertaV2Config,
            vocab_size=64,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            conv_kernel_size=3,
            **SMALL,
        ),
        IDS,
    ),
    "electra": Architecture(
        transformers_model(
            T.ElectraForSequenceClassification, T.ElectraConfig, vocab_size=64, embedding_size=8, **SMALL
        ),
        IDS,
    ),
    "albert": Architecture(  # one layer, which runs twice
        transformers_model(T.AlbertForSequenceClassification, T.AlbertConfig, vocab_size=64, embedding_size=8, **SMALL),
        IDS,
    ),
    "mpnet": Architecture(
        transformers_model(T.MPNetForSequenceClassification, T.MPNetConfig, vocab_size=64, **SMALL), IDS
    ),
    "modernbert": Architecture(
        transformers_model(
            T.ModernBertForSequenceClassification,
            T.ModernBertConfig,
            vocab_size=64,
            local_attention=4,
            **TOKENS,
            **SMALL,
        ),
        IDS,
    ),
    "bert_tokens": Architecture(
        transformers_model(T.BertForTokenClassification, T.BertConfig, vocab_size=64, **SMALL), IDS
    ),
    "bert_qa": Architecture(
        transformers_model(T.BertForQuestionAnswering, T.BertConfig, vocab_size=64, **SMALL), IDS, classes=(2, 2, 2)
    ),
    "bart": Architecture(
        transformers_model(T.BartForConditionalGeneration, T.BartConfig, **BART),
        {**IDS, "decoder_input_ids": IDS["input_ids"][:, :3]},
        has_head=False,
    ),
    "bart_classifier": Architecture(
        transformers_model(T.BartForSequenceClassification, T.BartConfig, eos_token_id=1, **BART), TEXT_WITH_END
    ),
    "gpt2": Architecture(transformers_model(T.GPT2LMHeadModel, T.GPT2Config, **GPT2), IDS, has_head=False),
    "gpt2_classifier": Architecture(transformers_model(T.GPT2ForSequenceClassification, T.GPT2Config, **GPT2), IDS),
    "llama": Architecture(
        transformers_model(T.LlamaForCausalLM, T.LlamaConfig, tie_word_embeddings=False, **LLAMA), IDS, has_head=False
    ),
    "llama_tied": Architecture(
        transformers_model(T.LlamaForCausalLM, T.LlamaConfig, tie_word_embeddings=True, **LLAMA), IDS, has_head=False
    ),
    "qwen2_classifier": Architecture(
        transformers_model(T.Qwen2ForSequenceClassification, T.Qwen2Config, pad_token_id=1, **LLAMA), IDS
    ),
    "deit": Architecture(transformers_model(T.DeiTForImageClassification, T.DeiTConfig, **VISION), IMAGE),
    "swin": Architecture(
        transformers_model(
            T.SwinForImageClassification,
            T.SwinConfig,
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=2,
            use_absolute_embeddings=True,
        ),
        IMAGE,
    ),
    "convnext": Architecture(
        transformers_model(
            T.ConvNextForImageClassification,
            T.ConvNextConfig,
            num_stages=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_scale_init_value=0.5,
        ),
        IMAGE,
    ),
    "resnet": Architecture(
        transformers_model(
            T.ResNetForImageClassification, T.ResNetConfig, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]
        ),
        IMAGE,
    ),
    "siglip": Architecture(
        transformers_model(T.SiglipForImageClassification, T.SiglipConfig, vision_config=VISION), IMAGE
    ),
    "siglip_vision": Architecture(  # pools by an nn.MultiheadAttention
        transformers_model(T.SiglipVisionModel, T.SiglipVisionConfig, **VISION), IMAGE, has_head=False
    ),
    "clip": Architecture(transformers_model(T.CLIPModel, T.CLIPConfig, **CLIP), {**IDS, **IMAGE}, has_head=False),
    "segformer": Architecture(
        transformers_model(
            T.SegformerForSemanticSegmentation,
            T.SegformerConfig,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
        ),
        IMAGE,
    ),
    "depth_anything": Architecture(
        transformers_model(
            T.DepthAnythingForDepthEstimation,
            T.DepthAnythingConfig,
            backbone_config=T.Dinov2Config(
                out_features=["stage1", "stage2"], reshape_hidden_states=False, apply_layernorm=True, **VISION
            ),
            patch_size=8,
            reassemble_hidden_size=16,
            reassemble_factors=[1, 0.5],
            neck_hidden_sizes=[8, 16],
            fusion_hidden_size=8,
            head_hidden_size=4,
            depth_estimation_type="metric",
        ),
        IMAGE,
    ),
    "wav2vec2": Architecture(
        transformers_model(
            T.Wav2Vec2ForSequenceClassification,
            T.Wav2Vec2Config,
            conv_dim=[8, 8],
            conv_kernel=[5, 3],
            conv_stride=[5, 2],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=8,
            use_weighted_layer_sum=True,
            **SMALL,
        ),
        {"input_values": torch.linspace(-1, 1, 2 * 200).view(2, 200).mul(7).sin()},
    ),
    "patchtst": Architecture(
        transformers_model(
            T.PatchTSTForClassification,
            T.PatchTSTConfig,
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            num_hidden_layers=2,
            d_model=16,
            num_attention_heads=2,
            ffn_dim=32,
            use_cls_token=True,
            positional_encoding_type="random",
            num_targets=4,
        ),
        {"past_values": torch.linspace(-1, 1, 2 * 16 * 2).view(2, 16, 2).mul(7).sin()},
        classes=(4, 4, 4),
    ),
    "git": Architecture(
        transformers_model(
            T.GitForCausalLM,
            T.GitConfig,
            vocab_size=64,
            bos_token_id=2,
            eos_token_id=3,
            num_image_with_embedding=2,
            vision_config=VISION,
            **SMALL,
        ),
        {**IDS, "pixel_values": IMAGE["pixel_values"][:, None].expand(-1, 2, -1, -1, -1).contiguous()},
        has_head=False,
    ),
    "plain_transformer": Architecture(lambda **_: PlainTransformer(), IMAGE, has_head=False),
    "holders": Architecture(lambda **_: Holders(), {"x": torch.linspace(-1, 1, 16).view(2, 8)}, has_head=False),
    "recurrent": Architecture(lambda **_: Recurrent(), IMAGE, has_head=False),
    "conv_net": Architecture(lambda **_: ConvNet(), IMAGE, has_head=False),
}


# What models call the tensor that they are about; two names are two tensors of one shape
OUTPUTS = (
    ("start_logits", "end_logits"),
    ("logits",),
    ("logits_per_image",),
    ("image_embeds",),
    ("predicted_depth",),
    ("prediction_logits",),
    ("pooler_output",),
)


def output(model, inputs):
    """The tensor that a model's forward is about."""
    return main_tensor(model(**inputs))


def main_tensor(result):
    names = next(names for names in OUTPUTS if names[0] in result)
    return torch.stack([result[name] for name in names])[0 if len(names) == 1 else slice(None)]


def without_sum(folder):
    """Has a saved adapter forget its sum, so that a test sees what finds a damage without it."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sha256": None}))


def make_experts(base, tasks, scale=0.05):
    """Fake fine-tunes: noise on every parameter. `tasks` is {task: number of classes}, or a list for the base's."""
    experts = {}
    for task in tasks:
        if not isinstance(tasks, dict):
            expert = copy.deepcopy(base)
        else:
            config = copy.deepcopy(base.config)
            config.num_labels = tasks[task]
            config.id2label = {i: f"{task}-{i}" for i in range(tasks[task])}
            config.label2id = {label: i for i, label in config.id2label.items()}
            expert = type(base)(config).eval()
            theirs = expert.state_dict()
            ours = {name: t for name, t in base.state_dict().items() if theirs[name].shape == t.shape}
            expert.load_state_dict(ours, strict=False)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(scale * torch.randn(parameter.shape))
        experts[task] = expert
    return experts
