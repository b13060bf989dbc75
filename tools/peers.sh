#!/bin/bash
# Environments of the peers that the benchmarks run beside ours: .venv-lerobot (LeRobot 0.4.4) and .venv-tfds (TensorFlow Datasets).
# Usage: tools/peers.sh PYTHON [TORCH_INDEX]; called by `make peers`. What exists is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 index=${2:-}
from=(); [ -z "$index" ] || from=(--index-url "$index")

make_env() {   # folder, function that installs: under another name until it is complete
    [ -x "$1/bin/python" ] && { echo "$1 exists"; return; }
    rm -rf "$1"; "$python" -m venv "$1"
    "$2" "$1/bin/python" -m pip install --quiet --disable-pip-version-check || { rm -rf "$1"; exit 1; }
    echo "$1 made"
}

lerobot() {    # torch and torchvision first, so that nothing takes another build of them
    "$@" "${from[@]}" torch==2.13.0
    "$@" "${from[@]}" --no-deps torchvision==0.28.0
    "$@" --no-deps lerobot==0.4.4 torchcodec==0.13.0
    "$@" torch==2.13.0 "datasets>=4,<5" "diffusers>=0.27.2,<0.36" "huggingface-hub>=0.34.2,<0.36" "accelerate>=1.10" "einops>=0.8" \
         "opencv-python-headless<4.13" "av>=15,<16" jsonlines "packaging<26" draccus==0.10.0 "gymnasium>=1.1.1,<2" "deepdiff>=7,<9" \
         imageio termcolor "setuptools<81" "transformers>=4.57.1,<5" safetensors num2words pyserial
    "$1" -c "import torchvision" 2>/dev/null || declare_operators "$1"
    "$1" -c "import torchcodec.decoders" 2>/dev/null || echo "torchcodec wants FFmpeg's libraries (Debian: apt-get install ffmpeg)" >&2
}

declare_operators() {   # a torchvision built for CUDA beside a torch built without: two operators must be known before it is imported
    local site; site=$("$1" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
    cat > "$site/torchvision_operators.py" <<'EOF'
import importlib.abc, sys
class Before(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision": return None
        sys.meta_path.remove(self)
        import torch
        Before.library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"): Before.library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.meta_path.insert(0, Before())
EOF
    echo "import torchvision_operators" > "$site/torchvision_operators.pth"
    "$1" -c "import torchvision"
}

tfds() { "$@" tensorflow-datasets==4.9.10 tensorflow-cpu==2.21.0 simplejpeg==1.9.0; }

make_env .venv-lerobot lerobot
make_env .venv-tfds tfds
