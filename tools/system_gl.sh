#!/bin/bash
# The simulator draws without a screen through EGL or OSMesa, which are system libraries. Install them where that is allowed,
# otherwise say what to type. Never fails: state-only work needs no rendering.
packages="libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2 libglvnd0"

found() { ldconfig -p 2>/dev/null | grep -Eq 'libEGL\.so\.1|libOSMesa\.so'; }

[ "$(uname -s)" = Linux ] || exit 0
found && exit 0
if command -v apt-get >/dev/null; then
    if [ "$(id -u)" = 0 ]; then prefix=""; elif sudo -n true 2>/dev/null; then prefix="sudo -n"; else prefix=none; fi
    if [ "$prefix" != none ]; then
        echo "installing the system's GL library for off-screen rendering"
        $prefix apt-get update -qq >/dev/null 2>&1
        # shellcheck disable=SC2086
        $prefix env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1
        found && exit 0
    fi
    echo "Off-screen rendering needs a GL library; type: sudo apt-get install $packages" >&2
else
    echo "Off-screen rendering needs a GL library: install your system's packages of Mesa's EGL (libEGL.so.1)." >&2
fi
