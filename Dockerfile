FROM python:3.13-slim AS builder
# Debian keeps one version of a package, so that a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build

# The dependencies have a layer of their own: an edit of the source does not fetch them anew.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        >requirements.txt \
    && pip wheel --wheel-dir /wheels --requirement requirements.txt

COPY LICENSE MANIFEST.in README.md setup.py ./
COPY tokenguard/ tokenguard/
RUN pip wheel --no-deps --wheel-dir /wheels .


FROM python:3.13-slim
# The wheels are lent, not copied: they are in no layer of what is shipped.
RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --root-user-action ignore /wheels/*.whl

# What runs can write nowhere, and need not: its files are root's, and the file system may be read-only.
ENV PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001:10001

EXPOSE 8000
STOPSIGNAL SIGTERM
# Without proxies: an http_proxy in the environment is for the way to the provider.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/', timeout=4)"]
ENTRYPOINT ["tokenguard"]
CMD ["serve", "--host", "0.0.0.0"]
