"""Tiny models built from configs, one a architecture, and fake fine-tunes of them. A test over `ARCHITECTURES` covers
an architecture from the day it is added."""

import copy
from typing import NamedTuple

import torch
import transformers as T
from torch import nn

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
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


class Architecture(NamedTuple):
    """`has_head`: experts may differ in the number of classes."""

    make: object
    inputs: dict
    has_head: bool = True

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
        {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 1], [20, 21, 22, 23, 24, 1]])},
    ),
    "plain_transformer": Architecture(lambda **_: PlainTransformer(), IMAGE, has_head=False),
    "conv_net": Architecture(lambda **_: ConvNet(), IMAGE, has_head=False),
}


def output(model, inputs):
    """The tensor that a model's forward is about."""
    result = model(**inputs)
    return result.logits if "logits" in result else result.image_embeds


def make_experts(base, tasks, scale=0.05):
    """Fake fine-tunes: noise on every parameter. `tasks` is {task: number of classes}, or a list for the base's."""
    experts = {}
    for task in tasks:
        expert = copy.deepcopy(base)
        if isinstance(tasks, dict):
            config = copy.deepcopy(base.config)
            config.num_labels = tasks[task]
            config.id2label = {i: f"{task}-{i}" for i in range(tasks[task])}
            config.label2id = {label: i for i, label in config.id2label.items()}
            expert = type(base)(config).eval()
            ours = {name: t for name, t in base.state_dict().items() if expert.state_dict()[name].shape == t.shape}
            expert.load_state_dict(ours, strict=False)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(scale * torch.randn(parameter.shape))
        experts[task] = expert
    return experts
