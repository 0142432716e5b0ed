"""What the installed versions allow: a test that needs more is skipped and says so."""

import peft
import pytest
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

HAS_OWN_ADAPTER_CALLS = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)
needs_own_adapter_calls = pytest.mark.skipif(
    not HAS_OWN_ADAPTER_CALLS,
    reason=f"`add_adapter` of transformers {transformers.__version__} needs PEFT {MIN_PEFT_VERSION}",
)
