#!/bin/sh
# The dashboard's tests ask a real Prometheus. Installs Debian's package where that is possible; says so where it is not.
command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing Debian's prometheus for the dashboard's tests"
    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus) >/dev/null 2>&1 && exit 0
fi
echo "no prometheus here and none can be installed: the dashboard's tests will be skipped" >&2
exit 0
