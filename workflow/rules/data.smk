# Data sets: from a mirror or a folder, checked, into one file each.


rule download:
    output:
        touch("<results>/data/{dataset}/.downloaded"),
    log:
        "<results>/logs/download/{dataset}.log",
    priority: EXPERIMENT.first
    localrule: True
    conda:
        "../envs/cnn.yaml"
    params:
        config=EXPERIMENT.settings_file,
        # What the files are; another list of mirrors is no reason to fetch them again.
        files=EXPERIMENT.dataset_files,
        folder=subpath(output[0], parent=True),
    shell:
        "python -m cnnlib download --config {params.config} --dataset {wildcards.dataset}"
        " --folder {params.folder}"


rule prepare:
    input:
        downloaded="<results>/data/{dataset}/.downloaded",
        code=code_of("cnnlib/datasets/__init__.py"),
    output:
        update("<results>/data/{dataset}.npz"),
    log:
        "<results>/logs/prepare/{dataset}.log",
    priority: EXPERIMENT.first
    conda:
        "../envs/cnn.yaml"
    params:
        config=EXPERIMENT.settings_file,
        spec=EXPERIMENT.dataset_settings,
        folder=subpath(input.downloaded, parent=True),
    shell:
        "python -m cnnlib prepare --config {params.config} --dataset {wildcards.dataset}"
        " --folder {params.folder} --out {output} 2>&1 | tee {log}"
