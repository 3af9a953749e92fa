"""The package as a whole: light to import, complete, and open to static checks."""

import subprocess
import sys
from pathlib import Path

import vlm_mech

ROOT = Path(__file__).parents[1]


def test_import_is_light():
    code = "import vlm_mech, sys; assert not {'torch', 'pandas', 'transformers', 'plotly'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_name_it_lists_exists():
    for name in vlm_mech.__all__:
        assert getattr(vlm_mech, name) is not None
    assert set(vlm_mech.__all__) == set(dir(vlm_mech))


def test_nnsight_and_the_vision_stack_need_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None\nfrom vlm_mech import VLM\nprint(VLM.load('organism'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "vision (clip)" in done.stdout and "Warning" not in done.stderr, done.stderr
