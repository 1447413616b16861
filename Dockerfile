# Everything a node of a cluster needs, as on the machine where it was tested: docker build -t REPLACE/entprog:0.2.0 .
# Ray's image brings what `ray up` and KubeRay expect (user `ray`, ssh tools); its Ray is replaced by the locked one.
# By digest it can never be another one:
#   docker buildx imagetools inspect rayproject/ray:2.60.0-py311-gpu      (shows its Digest)
#   docker build --build-arg BASE=rayproject/ray@sha256:… -t REPLACE/entprog:0.2.0 .
ARG BASE=rayproject/ray:2.60.0-py311-gpu
FROM ${BASE}

USER root
RUN apt-get update && apt-get install --yes --no-install-recommends nfs-common rsync && rm -rf /var/lib/apt/lists/*
# For AWS instances with EFA: --build-arg EFA=VERSION, a version of Amazon's installer. Not tried.
ARG EFA=
RUN if [ -n "$EFA" ]; then cd /tmp && python -c "import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])" \
    https://efa-installer.amazonaws.com/aws-efa-installer-$EFA.tar.gz aws-efa-installer.tar.gz \
    && tar xzf aws-efa-installer.tar.gz && cd aws-efa-installer \
    && ./efa_installer.sh -y -g --skip-kmod --skip-limit-conf --no-verify && rm -rf /tmp/aws-efa-installer*; fi
USER ray
WORKDIR /home/ray/entprog

# Dependencies first, they change less often than the code: all that was tested, by hash (also what LoRA, FP8 and pose
# need), and torch for GPUs with the CUDA libraries that it names itself.
COPY --chown=ray constraints.txt requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock \
    && pip install --no-cache-dir --constraint constraints.txt torch
COPY --chown=ray . .
RUN pip install --no-cache-dir --no-deps --editable . && python -m pipelines.train --help > /dev/null

# Runs say which code they are of: --build-arg COMMIT=$(git rev-parse HEAD); without, the version.
ARG COMMIT=
ENV ENTPROG_COMMIT=${COMMIT}
# A job that is told to stop has time for a checkpoint.
ENV RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=100
