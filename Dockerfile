# An image of pokebridge with the driver of every engine and without test tools. It runs as an unprivileged user.
# docker build -t pokebridge .

FROM python:3.11-slim AS build
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements.lock pyproject.toml ./
# Only pip is installed. It installs the uv that the lock names, by its hash. uv installs the rest, and checks
# all hashes against the same lock.
RUN awk '/^[^ #]/ {wanted = /^uv==/} wanted' requirements.lock > uv.lock \
 && pip install --quiet --no-deps --require-hashes --requirement uv.lock \
 && uv venv --quiet /opt/pokebridge
# This layer changes only with the lock, so most builds find it in the cache.
RUN VIRTUAL_ENV=/opt/pokebridge uv pip install --quiet --constraint requirements.lock \
      --requirement pyproject.toml --extra pubsub --extra nats --extra redis --extra postgres --extra otel
COPY README.md LICENSE NOTICE ./
COPY src src
RUN uv pip install --quiet --system --constraint requirements.lock hatchling \
 && uv build --quiet --wheel --no-build-isolation --python /usr/local/bin/python3 --out-dir dist . \
 && VIRTUAL_ENV=/opt/pokebridge uv pip install --quiet --no-deps dist/*.whl

FROM python:3.11-slim
COPY --from=build /opt/pokebridge /opt/pokebridge
# The default mailbox is a file in the working directory. For more than a trial, set another one.
RUN install --directory --owner=10001 --group=10001 /var/lib/pokebridge
WORKDIR /var/lib/pokebridge
USER 10001:10001
ENV PATH=/opt/pokebridge/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    POKEBRIDGE_HOST=0.0.0.0
EXPOSE 8080
ENTRYPOINT ["pokebridge"]
CMD ["serve"]
