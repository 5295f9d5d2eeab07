"""timm's own tests/test_models.py on our names; it is not part of this repository.

Fetch it from the release of timm that is installed and name it in TIMM_TEST_MODELS:
    TIMM_TEST_MODELS=pytorch-image-models/tests/test_models.py pytest tests/test_timm_suite.py -m slow
TIMM_TEST_ONLY="nat or pit_ti" chooses among them; the file leaves out images larger than its own limits (the ttreg ViTs' 518
pixels in test_model_default_cfgs_non_std).

On 22 November 2026, with the file of timm's commit aa4b585, timm 1.0.31 and torch 2.15 on a CPU, everything selected below
passed for all 59 names. On 28 November 2026, the same with torch 2.14.1, it passed for mvit_v1_b_16.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILE = os.environ.get("TIMM_TEST_MODELS")
# torchscript: timm is leaving torch.jit, which refuses torch.compiler.is_exporting and timm's own checkpoint_seq.
# load_pretrained, features_pretrained: need every published file. test_model_inference, naflex, gemma: timm's own models only.
SKIPPED = "torchscript or load_pretrained or features_pretrained or test_model_inference or naflex or gemma"


@pytest.mark.slow
@pytest.mark.skipif(FILE is None, reason="TIMM_TEST_MODELS does not name timm's tests/test_models.py")
def test_timms_own_tests_pass_on_our_models(tmp_path):
    shutil.copy(FILE, tmp_path / "test_models.py")
    markers = "base cfg torchscript features fxforward fxbackward timeout(seconds)"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {m}: timm's\n" for m in markers.split()))
    chosen = os.environ.get("TIMM_TEST_ONLY", "")
    chosen = f" and ({chosen})" if chosen else ""
    arguments = ["-q", "-p", "timm_names", "-k", f"not ({SKIPPED}){chosen}", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *arguments, "test_models.py"]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
