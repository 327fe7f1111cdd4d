"""What other trainers call their options, and what there is here instead; the README shows the same table."""

from fnmatch import fnmatchcase

# Names as kohya's scripts, OneTrainer, SimpleTuner, diffusion-pipe, the other diffusers scripts and accelerate have them, `*`
# for any letters -> what to give here, or that there is none. The first row that has a name answers.
ELSEWHERE = {
    # What is trained.
    "network_dim lora_dim dim network_rank lora_r use_lora use_peft adapter lora": "--lora_rank, which trains adapters",
    "network_alpha alpha": "--lora_alpha, which is the rank where it is left out, and not 1",
    "network_dropout dropout_probability rank_dropout module_dropout": "--lora_dropout",
    "dora_* lora_decompose*": "--use_dora",
    "lora_initiali* init_lora_weights": "--lora_init",
    "network_weights init_lora lora_model_name init_from_existing resume_from_lora": "--lora_weights, with its --lora_rank",
    "lora_format": "--save_format",
    "network_train_unet_only layer_filter* lora_layers target_modules lora_target_modules": "--lora_targets",
    "network_module network_args network_* lora_type lokr_* loha_* oft_* lycoris_* peft_type adapter_* training_method": (
        "adapters are LoRA and DoRA of linear layers and convolutions: --lora_rank with --lora_targets"
    ),
    "scale_weight_norms": "the norms of adapters have no limit",
    "base_weights* fuse_adapters merge_adapters": (
        "`python -m engine.export --merge ADAPTER` makes the pipeline with adapters in it, which is then trained on"
    ),
    "dim_from_weights save_lora* freeze_model": (
        "one adapter is trained, beside the weights of the model as they are"
    ),
    "train_te train_te1 train_clip text_encoder_train network_train_text_encoder*": "--train_text_encoder, for sd",
    "text_encoder_learning_rate text_encoder_lora* learning_rate_te learning_rate_te1 text_encoder_1_learning_rate te_lr": (
        "--text_encoder_lr with --train_text_encoder"
    ),
    "stop_text_encoder_training train_text_encoder_frac text_encoder_stop_training_after*": (
        "a text encoder that is trained is so to the end; a second run without --train_text_encoder goes on from its result"
    ),
    "text_encoder_use_attention_mask skip_save_text_encoder text_encoder_2* text_encoder_3* train_te2 learning_rate_te2 "
    "clip_skip text_encoder_layer_skip": "there is one text encoder, which gives its last hidden state",
    "model_type model_family v2 is_sdxl": "--family, which says what is trained",
    "v_parameterization force_v_prediction": "--prediction_type v_prediction",
    "force_epsilon_prediction": "--prediction_type epsilon",
    "token_string placeholder embedding_name": "--placeholder_token, which captions hold",
    "init_word initial_embedding_text": "--initializer_token, one word",
    "num_vectors_per_token embedding_token_count": "--num_vectors",
    "learnable_property use_object_template use_style_template": (
        "--caption_template with the sentences, each with {caption} in the place of the token"
    ),
    "embedding modifier_token additional_embeddings": "one token is trained, beside a model that stays as it is",
    "controlnet_* conditioning_image_column original_image_column edited_image_column "
    "edit_prompt_column control_path control_type": "models that take another image are not trained",
    "teacher_revision pretrained_teacher_model num_ddim_timesteps w_min w_max": "no distillation",
    "discrete_flow_shift flow_* shift scheduled_sampling_* timestep_shift timestep_sample_method max_sequence_length t5* "
    "clip_l clip_g": "no model of flow matching is trained (SD 3, FLUX)",
    "base_model_name model model_name model_name_or_path ckpt ckpt_path diffusers_path pretrained_model checkpoint_path": (
        "--pretrained_model_name_or_path"
    ),
    "vae vae_path pretrained_vae_* no_half_vae text_encoder pretrained_text_encoder* unet": (
        "put the part into the folder of the pipeline that --pretrained_model_name_or_path names"
    ),
    # Data.
    "image_dir image_folder data_dir data_path dataset_path dataset "
    "in_json train_data images": (
        "--train_data_dir, a folder of images and their captions, or --dataset_name"
    ),
    "dataset_config data_backend_config concept_file_name concepts concepts_list datasets subsets": (
        "a [[data]] table for each data set, in the TOML file that --config names"
    ),
    "caption_suffix": "--caption_template, of which {caption} is a part",
    "prompt_prefix": "--caption_prefix",
    "shuffle_caption shuffle_captions tag_shuffle enable_tag_shuffling shuffle_prompt": "--shuffle_tags",
    "keep_tags_count keep_tags": "--keep_tokens",
    "cache_shuffle_num": "--caption_variants",
    "cache_shuffle_delimiter tag_delimiter keep_tokens_separator caption_separator secondary_separator": "commas separate tags",
    "caption_tag_dropout_rate tag_dropout*": "tags are not dropped; --proportion_empty_prompts drops whole captions",
    "class_tokens": "--instance_prompt with --instance_data_dir; in a [[data]] table `prompt`",
    "caption_extension caption_extention caption_strategy "
    "token_warmup* instanceprompt": (
        "captions beside the images, in a `.txt` each, or in the column of a table that --caption_column names"
    ),
    "caption_dropout_rate caption_dropout caption_dropout_prob* cond_dropout_prob conditioning_dropout_prob "
    "cfg_dropout_prob ucg_rate": "--proportion_empty_prompts",
    "reg_data_dir": (
        "--with_prior_preservation with --class_data_dir and --class_prompt; or a [[data]] table with `loss_weight`"
    ),
    "is_reg is_regularisation_data is_regularization_data loss_weight loss_multiplier": (
        "`loss_weight` in a [[data]] table, with `prompt` where its images have no captions"
    ),
    "num_reg_images": "--num_class_images",
    "masked_prior_preservation_weight prior_divergence_loss*": "no prediction of the model before it was trained is kept",
    "caption_dropout_every_n_epochs": "--proportion_empty_prompts, the same in every epoch",
    "weighted_captions max_token_length tokenizer_max_length enable_wildcard": (
        "captions are tokenized as the pipeline does it; give several per image in a list"
    ),
    "enable_bucket enable_ar_bucket aspect_ratio_bucketing use_aspect_ratio_buckets bucketing": "--buckets",
    "ar_buckets size_buckets crop_aspect_buckets bucket_sizes bucket_list": "--buckets with a list: --buckets 512x512 640x384",
    "bucket_reso_steps bucket_resolution_steps aspect_bucket_alignment aspect_bucket_rounding bucket_divisibility": (
        "--bucket_step"
    ),
    "*_bucket_reso *_ar num_ar_buckets max_aspect_ratio bucket_ratio": (
        "--bucket_max_ratio, for how oblong sizes are, and --bucket_area, for how many pixels they have"
    ),
    "target_area pixel_area": "--bucket_area",
    "bucket_no_upscale minimum_image_size upscale_*": (
        "images are brought to the size of their bucket; --max_upscale refuses those that would be enlarged by more"
    ),
    "frame_buckets": "no video",
    "resolution_type maximum_image_size target_downsample_size": (
        "--resolution, in pixels of a side; with --buckets of as many pixels in all, or of --bucket_area"
    ),
    "height width image_size resolutions size": "--resolution, one number; --buckets for images that are not square",
    "flip_aug hflip": "--random_flip",
    "random_crop crop crop_aspect face_crop_aug_range": "--random_crops, without --center_crop",
    "text_column caption_key": "--caption_column",
    "image_key dataset_image_column_name": "--image_column",
    "tokenizer_cache_dir huggingface_cache_dir": "--cache_dir",
    "color_aug": "colours stay as they are",
    "resize_interpolation": "--image_interpolation_mode",
    "repeats dataset_repeats num_repeats balancing balancing_strategy": (
        "`repeats`, or `weight`, in a [[data]] table of the TOML file"
    ),
    "conditioning_data_dir": (
        "masks lie beside the images (IMAGE-masklabel.png, with --mask_column masklabel), and models that take another image "
        "are not trained"
    ),
    "masked_loss masked_training mask_path alpha_mask": (
        "--mask_column, with masks beside the images (IMAGE-masklabel.png: --mask_column masklabel) or in a column of a table"
    ),
    "unmasked_weight": "--mask_column, with masks that are grey, and not black, where a little is to be trained",
    "unmasked_probability normalize_masked_area_loss": (
        "masks of --mask_column always weigh, and the mean is over all positions"
    ),
    "cache_latents* cache_text_encoder_outputs* latent_caching vae_cache* text_cache* "
    "skip_cache_check text_embed*": "not needed: latents and captions are always encoded once, into --shards_dir",
    "regenerate_cache clear_cache_before_training": "delete --shards_dir, and it is built again",
    "trust_cache override_dataset_config": "--trust_shards",
    "dataset_split_name split": "the split `train` is read",
    "streaming webdataset use_webdataset train_shards_path_or_url": (
        "data are encoded first, from a folder, a table, tars or the hub; shards are read from anywhere: --shards_dir ADDRESS"
    ),
    "cache_only only_cache": "`python -m engine.shards build`",
    "cache_dir_vae cache_dir_text": "--shards_dir",
    "vae_batch_size caching_batch_size vae_encode_batch_size text_encoder_batch_size write_batch_size": "--encode_batch_size",
    "max_data_loader_n_workers dataloader_threads num_workers map_num_proc": "--dataloader_num_workers",
    "persistent_data_loader_workers dataloader_prefetch* loader_prefetch* dataset_preprocess_batch_size": (
        "not needed: the loader always reads ahead"
    ),
    # How long, and how much at a time.
    "max_train_epochs epochs num_epochs": "--num_train_epochs",
    "max_steps num_training_steps stop_training_after train_steps steps iterations": "--max_train_steps",
    "batch_size micro_batch_size_per_gpu per_device_train_batch_size per_gpu_batch_size": "--train_batch_size",
    "gradient_clipping clip_grad_norm gradient_clip": "--max_grad_norm",
    "frames num_frames max_num_frames video_* fps": "no video",
    "gradient_checkpointing_* activation_offloading cpu_offload_checkpointing activation_checkpointing": (
        "--gradient_checkpointing"
    ),
    # Optimizer.
    "learning_rate_scaler": "--scale_lr",
    "lr unet_lr unet_learning_rate learning_rate_unet": "--learning_rate",
    "block_lr down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold network_reg_lrs lr_multipliers param_groups": (
        "--lr_of PATTERN=RATE, for example --lr_of down_blocks.0=1e-5 mid_block=5e-6"
    ),
    "layer_decay llrd layerwise_lr_decay layer_wise_lr_decay lr_layer_decay": "--layer_lr_decay",
    "freeze_layers freeze_layer frozen_layers freeze_params freeze_parameters layer_freeze_strategy layer_freeze_unfreeze": (
        "--freeze, with patterns of the weights' names"
    ),
    "warmup_steps learning_rate_warmup_steps": "--lr_warmup_steps",
    "learning_rate_scheduler lr_scheduler_type": "--lr_scheduler",
    "learning_rate_cycles lr_scheduler_num_cycles": "--lr_num_cycles",
    "lr_scheduler_power": "--lr_power",
    "lr_scheduler_* learning_rate_min_factor lr_end lr_decay_steps lr_decay": (
        "the schedules of --lr_scheduler end at 0, with the training"
    ),
    "optimizer_type optimizer_name optim": "--optimizer",
    "use_lion_optimizer": "--optimizer lion",
    "use_adafactor use_adafactor_optimizer": "--optimizer adafactor",
    "optimizer_* prodigy_* use_8bit_ademamix": (
        "what --optimizer names takes --learning_rate, --adam_beta1, --adam_beta2, --adam_weight_decay and --adam_epsilon"
    ),
    "fused_backward_pass fused_back_pass": "the optimizer steps on flat memory in one pass, once all gradients are there",
    "loraplus_*": "--lr_of with patterns of the adapters' second matrices, for example *.lora_B*=1e-3",
    "stochastic_rounding use_stochastic_rounding": "--masters none",
    "full_bf16": "--mixed_precision bf16 with --masters none",
    "weight_decay": "--adam_weight_decay",
    "beta1": "--adam_beta1",
    "beta2": "--adam_beta2",
    "eps": "--adam_epsilon",
    "betas": "--adam_beta1 and --adam_beta2",
    "ema": "--use_ema",
    "ema_decay ema_max_decay ema_inv_gamma ema_power ema_min_decay ema_update_* ema_warmup_steps use_ema_warmup": (
        "the average's decay grows to 0.9999, as in the script; --use_ema keeps one"
    ),
    "ema_device ema_cpu_only": "--offload_ema",
    "ema_foreach_disable": "not needed: it is always so",
    # Objective.
    "min_snr_gamma": "--snr_gamma",
    "offset_noise_weight": "--noise_offset",
    "ip_noise_gamma perturbation_noise_weight input_pertubation": "--input_perturbation",
    "multires_noise_discount": "--pyramid_noise_discount",
    "multires_noise_iterations": "--pyramid_noise_iterations, which counts the coarser levels",
    "adaptive_noise_scale *_random_strength perlin_noise": (
        "noise is changed by --noise_offset, --pyramid_noise_iterations and --input_perturbation alone"
    ),
    "debiased_estimation_loss": "--loss_weighting debiased",
    "use_soft_min_snr soft_min_snr_*": "--loss_weighting soft_min_snr with --snr_gamma",
    "loss_weight_fn loss_weight_strength": "--loss_weighting, with --snr_gamma, --p2_gamma or --edm_sigma_data",
    "scale_v_pred_loss_like_noise_pred v_pred_like_loss": "whatever is predicted, --loss_weighting weighs an error alike",
    "pseudo_huber_c huber_delta": "--huber_c, with --loss_type huber",
    "huber_scale mse_strength mae_strength log_cosh_strength huber_strength": "the loss that --loss_type names has no factor",
    "weighting_scheme timestep_distribution": "--timestep_sampling",
    "noising_bias": "--logit_mean, with --timestep_sampling logit_normal",
    "noising_weight": "--logit_std, with --timestep_sampling logit_normal",
    "min_noising_strength": "--min_timestep, counted in timesteps",
    "max_noising_strength": "--max_timestep, counted in timesteps",
    "dynamic_timestep_shifting": "no density of --timestep_sampling depends on the size",
    "zero_terminal_snr rescale_noise_scheduler_to_zero_terminal_snr": (
        "--rescale_betas_zero_snr, with --prediction_type v_prediction"
    ),
    # Precision, memory and speed.
    "full_fp16 fp16": "--mixed_precision fp16",
    "bf16": "--mixed_precision bf16",
    "train_dtype weight_dtype dtype": "--mixed_precision",
    "base_model_precision base_model_default_dtype fp8_base* transformer_dtype quantization quantize_via": (
        "--base_precision, with --lora_rank"
    ),
    "do_fp8_training quantize_* quantized_model_path": (
        "--matrix_precision fp8, for kandinsky-prior and wuerstchen"
    ),
    "xformers use_xformers diffusers_xformers": "--attention xformers",
    "sdpa mem_eff_attn split_attn attention_mechanism attn_mode use_flash_attn enable_npu_flash_attention": "--attention",
    "torch_compile dynamo_backend use_torch_compile": "--compile",
    "lowram highvram blocks_to_swap *_blocks_to_swap offload_fraction block_swap* ramtorch* group_offload*": (
        "--zero_stage 3 with --offload_parameters, or --offload_optimizer"
    ),
    "offload_optimizer_device": "--offload_optimizer",
    "offload_optimizer_nvme_path": "--nvme_path",
    "offload_param_device": "--offload_parameters",
    "deepspeed use_deepspeed deepspeed_config_file": "--zero_stage, with --deepspeed_config for more",
    "ddp_* zero3_* fsdp_* use_fsdp": "not needed: --zero_stage says how the state is divided",
    "multi_gpu num_processes num_machines machine_rank main_process_* gpu_ids num_gpus device_indexes "
    "num_cpu_threads_per_process pipeline_stages": "`torchrun --nproc-per-node N -m engine.run ...` starts several processes",
    # Results.
    "output_name output workspace_dir output_model_destination save_dir": "--output_dir",
    "save_every_n_steps save_steps checkpoint_step_interval backup_after save_every save_after checkpointing_interval": (
        "--checkpointing_steps"
    ),
    "save_every_n_epochs checkpoint_every_n_* checkpointing_epochs save_model_epochs checkpoint_epoch_interval "
    "save_n_epoch_ratio": "--checkpointing_steps, counted in steps",
    "save_last_n_* rolling_backup* save_total_limit": "--checkpoints_total_limit",
    "overwrite_output_dir": "--overwrite",
    "save_state*": "not needed: a checkpoint always holds the whole state",
    "resume continue_last_backup resume_from": "--resume_from_checkpoint latest",
    "initial_epoch initial_step skip_until_initial_step": "--resume_from_checkpoint, which goes on after the checkpoint's step",
    "save_model_as save_precision save_dtype output_dtype output_model_format use_safetensors": (
        "the result is a diffusers pipeline in fp32, of which `python -m engine.export` makes a single file in any precision, "
        "or a LoRA, whose form --save_format says"
    ),
    "huggingface_repo_id hub_repo": "--push_to_hub with --hub_model_id",
    "hub_private_repo huggingface_repo_visibility huggingface_repo_type": "create the repository first, as it is to be",
    "huggingface_token": "--hub_token, or `hf auth login`",
    # Reports.
    "log_with logger tensorboard enable_wandb wandb_enable report_to_wandb": "--report_to",
    "wandb_api_key wandb_key": "`wandb login`, or the variable WANDB_API_KEY",
    "wandb_entity": "the variable WANDB_ENTITY",
    "log_tracker_name wandb_project_name wandb_tracker_name tracker_name project wandb_project": "--tracker_project_name",
    "logging_steps log_steps steps_per_print": "--log_every",
    "sample_prompts sample_definition_file_name user_prompt_library final_validation_prompt": (
        "--validation_prompts; `python -m engine.sample --prompts FILE` takes files of them, in the form of kohya's too"
    ),
    "sample_every_* sample_after* sample_at_first validation_step_interval validation_epoch_interval save_images_epochs": (
        "--validation_epochs, counted in epochs"
    ),
    "sample_sampler validation_guidance* validation_num_inference_steps validation_resolution validation_negative_prompt "
    "validation_seed num_inference_steps validation_inference_steps guidance_scale": (
        "validation images are drawn as the pipeline draws; `python -m engine.sample` has all of that, for each prompt of a "
        "file too, and draws with every checkpoint by `--compare OUTPUT_DIR`"
    ),
    "num_validation_image validation_number_images": "--num_validation_images",
    "wandb_run_name run_name tracker_run": "--tracker_run_name",
    "validation_split validation_ratio val_split": "--validation_fraction",
    "validation_images class_labels_conditioning": "nothing here: it is of DeepFloyd IF, which is not trained",
    "validation_dataset* val_data_dir eval_datasets eval_dataset_id eval_dataset eval_data_dir eval_dataset_name": (
        "--validation_data_dir"
    ),
    "validate_every_n_steps validate_every_n_* validate_after* eval_every_n_* eval_steps eval_steps_interval validation "
    "validation_unit val_steps": "--validation_steps, with --validation_fraction or --validation_data_dir",
    "max_validation_steps eval_max_samples max_val_samples": "--max_validation_samples",
    "eval_timesteps eval_timestep_* eval_quantiles": "--validation_timesteps",
    "eval_before_first_step eval_at_start eval_gradient_accumulation_steps eval_micro_batch_size_per_gpu eval_batch_size "
    "per_device_eval_batch_size": "not needed: the held-out loss is taken in the batches of training",
    "load_best_model_at_end save_best metric_for_best_model": "--best_checkpoint",
    "early_stopping_patience early_stopping early_stop_patience": "--patience",
    "metadata_title metadata_author metadata_description metadata_license metadata_tags no_metadata training_comment "
    "modelspec_* webhook_config": "nothing of that kind is written",
    "config_file": "--config, a TOML file of options, with a [[data]] table for each of several data sets",
}  # fmt: skip


def answer(name: str) -> str | None:
    """What there is here of an option that has this name elsewhere; None where nothing is known of it."""
    return next((here for names, here in ELSEWHERE.items() if any(fnmatchcase(name, each) for each in names.split())), None)
