"""Names that are not known: what is near, and what other programs call our keys."""

import difflib
from collections.abc import Collection, Iterable

# Below the first likeness a name is not what was meant; below the second only if it begins alike.
_NEAR, _NEAR_ANYHOW = 0.66, 0.8

# Words that are no keys here, and what there is instead.
_INSTEAD = {
    "config": "; CONFIG comes first, without a key",
    "dry_run": "; did you mean '--dry_run'?",
    "resume": "; `peerlearn resume RUN` continues a run",
    "sweep": "; `peerlearn study --pretrain WORDS --grid KEY=V1,V2 --folder FOLDER` runs grids",
    "throttle": "; `peerlearn study --throttle N` runs grids",
    "<<": "; merge keys are not read: write the keys out",
}

# Our keys, and what other programs call them.
_ELSEWHERE = {
    "base_lr": "lr learning_rate init_lr lrs blr",
    "batch_size": "b bs bsz batch batchsize mini_batch train_batch_size batch_size_per_gpu "
    "per_device_train_batch_size per_gpu_batch_size",
    "epochs": "e ep epoch max_epochs n_epochs num_epochs nepochs num_train_epochs total_epochs",
    "method": "algo algorithm loss criterion",
    "seed": "s random_seed manual_seed rng_seed",
    "seeds": "seed num_seeds random_seeds",
    "run": "o out output outdir out_dir output_dir output_folder output_path save_dir save_path log_dir logdir "
    "work_dir workdir exp_dir exp_name experiment default_root_dir ckpt_dir checkpoint_dir run_dir run_name rundir dir",
    "results": "o out output outdir out_dir output_dir output_folder output_path save_dir save_path log_dir logdir "
    "work_dir results_dir result_dir run",
    "folder": "o out output outdir out_dir output_dir output_folder save_dir log_dir logdir work_dir run dir",
    "checkpoint": "ckpt ckpt_path weights load_from model_path pretrained pretrained_path resume model",
    "device": "gpu gpus gpu_id gpu_ids n_gpu n_gpus ngpus num_gpus devices cuda accelerator dev use_cuda no_cuda",
    "precision": "amp bf16 dtype fp16 half mixed_precision use_amp",
    "accumulation_steps": "accum accum_iter accumulate_grad_batches grad_accum grad_accum_steps "
    "gradient_accumulation_steps update_freq",
    "temperature": "t tau temp moco_t nce_t softmax_temp",
    "soft_temperature": "kd_t kd_temperature distill_temperature",
    "cohort.backbones": "a arch arch_name architecture architectures backbone base_encoder encoder model model_name "
    "net network timm_model backbone_name",
    "cohort.init": "pretrained pretrained_weights init init_from init_weights initial_weights weights load_from "
    "start_from finetune finetune_from",
    "cohort.networks": "num_networks n_networks number_net num_branches num_peers peers members num_models",
    "cohort.embedding_dim": "dim embed_dim emb_dim feat_dim feature_dim moco_dim out_dim proj_dim proj_output_dim",
    "cohort.projection": "mlp head projector",
    "cohort.sync_batch_norm": "sync_bn syncbn",
    "queue.size": "moco_k nce_k queue_length queue_len queue_size memory_size bank_size",
    "queue.momentum": "ema ema_decay m moco_m base_tau",
    "supervised.num_negatives": "num_neg n_negatives",
    "data.name": "d data data_name data_set dataset dataset_name",
    "data.root": "data_dir data_path data_root data_folder dataset_dir dataset_path dataset_root dataroot datadir "
    "imagenet_path train_dir train_data",
    "data.backend": "loader dataloader",
    "data.limit": "max_images max_samples n_images num_images num_samples subset",
    "data.image_size": "img_size imgsz crop_size input_size resolution image_dim size",
    "data.workers": "j worker num_workers n_workers dataloader_num_workers num_data_workers",
    "data.augmentation": "aug augment aug_plus augmentations transform transforms",
    "data.views.jitter": "color_jitter colour_jitter colorjitter",
    "data.views.jitter_probability": "color_jitter_prob jitter_prob jitter_p",
    "data.views.grayscale_probability": "gray_scale gray_scale_prob grayscale_prob greyscale",
    "data.views.blur_probability": "blur gaussian_blur gaussian_prob gaussian_blur_prob",
    "data.views.solarize_probability": "solarize solarise solarization solarization_prob",
    "data.views.flip_probability": "flip hflip horizontal_flip_prob",
    "data.validation_percent": "val_split validation_split val_size",
    "data.shots": "n_shots num_shots images_per_class",
    "optimizer.name": "opt optim optimiser",
    "optimizer.weight_decay": "wd decay l2 weight_decay",
    "weight_decay": "wd decay l2",
    "schedule.name": "cos cosine lr_schedule lr_scheduler sched scheduler",
    "schedule.warmup_epochs": "warmup warm_up",
    "schedule.milestones_epochs": "lr_decay_epochs lr_steps",
    "checkpoint.every_steps": "save_every save_freq save_interval save_steps",
    "monitor.every_epochs": "eval_every eval_freq eval_interval knn_every",
    "monitor.log_every_steps": "log_every log_freq log_interval logging_steps print_freq",
    "k": "knn_k nb_knn neighbors neighbours n_neighbors",
    "monitor.k": "k knn_k nb_knn neighbors neighbours n_neighbors",
    "penalties_c": "c penalty reg",
    "max_iterations": "max_iter n_iter",
    "cluster": "profile",
    "gpus_per_node": "g gpu gpus gres n_gpus ngpus num_gpus gpus_per_task devices",
    "tasks_per_node": "n ntasks ntasks_per_node nproc_per_node num_processes",
    "cpus_per_task": "c cpu cpus cores num_cpus",
    "nodes": "nnodes num_nodes machines",
    "memory_gb": "mem mem_gb memory ram",
    "time_minutes": "t time time_limit timeout walltime time_min timeout_min hours minutes",
    "partition": "p queue queue_name",
    "name": "job_name jobname",
    "environment": "env export",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a'?"`` for the known name closest to ``name``; "" if none is near."""
    close = _closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def nearest_key(name: str, keys: Collection[str]) -> str:
    """As `nearest`, of a dotted key: by what other programs call it, by its last part, then by likeness.

    Args:
        name: the unknown key, with or without its dashes.
        keys: the keys that take a value.
    """
    name = name.strip("-").lower().replace("-", "_")
    last = name.rsplit(".", 1)[-1]
    if name in keys:
        return f"; did you mean {name!r}?"
    called = [key for key in _ELSEWHERE if key in keys and last in _ELSEWHERE[key].split()]
    if called:
        return f"; here it is called {called[0]!r}"
    same = [key for key in keys if key.rsplit(".", 1)[-1] == last]
    if same:
        return f"; did you mean {' or '.join(map(repr, same))}?"
    if last in _INSTEAD:
        return _INSTEAD[last]
    parts = {key.rsplit(".", 1)[-1]: key for key in keys}
    close = _closest(last, parts)
    return nearest(name, keys) or (f"; did you mean {parts[close]!r}?" if close else "")


def _closest(name: str, known: Iterable[str]) -> str | None:
    for close in difflib.get_close_matches(name, list(known), n=3, cutoff=_NEAR):
        likeness = difflib.SequenceMatcher(None, name, close).ratio()
        if close[:1] == name[:1] or likeness >= _NEAR_ANYHOW:
            return close
    return None
