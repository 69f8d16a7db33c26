//! Words of other trainers for keys, algorithms and losses of this one, for the hints of errors.

/// A key as others call it, and what it is here.
pub const KEYS: &[(&str, &str)] = &[
    ("lr", "`optimizer.learning_rate`"),
    ("learning_rate", "`optimizer.learning_rate`"),
    ("max_tokens", "`rollout.max_new_tokens`"),
    ("max_new_tokens", "`rollout.max_new_tokens`"),
    ("max_completion_length", "`rollout.max_new_tokens`"),
    ("response_length", "`rollout.max_new_tokens`"),
    ("max_length", "`data.tokens_max` for rows, `prompts.tokens_max` and `rollout.max_new_tokens` for completions"),
    ("max_seq_length", "`data.tokens_max`"),
    ("max_prompt_length", "`prompts.tokens_max`"),
    ("num_generations", "`rollout.completions_per_prompt`"),
    ("group_size", "`rollout.completions_per_prompt`"),
    ("n", "`rollout.completions_per_prompt`"),
    ("batch_size", "`data.batch_size` for rows, `rollout.prompts_per_step` for prompts"),
    ("train_batch_size", "`data.batch_size` for rows, `rollout.prompts_per_step` for prompts"),
    ("per_device_train_batch_size", "`data.batch_size` for rows, `rollout.prompts_per_step` for prompts"),
    ("gradient_accumulation_steps", "`optimizer.micro_batch_tokens`: micro-batches are cut by tokens"),
    ("epochs", "`data.epochs`"),
    ("num_epochs", "`data.epochs`"),
    ("num_train_epochs", "`data.epochs`"),
    ("max_steps", "`job.steps`"),
    ("num_train_steps", "`job.steps`"),
    ("output_dir", "`job.directory`"),
    ("warmup_ratio", "`optimizer.warmup_steps`"),
    ("grad_clip", "`optimizer.max_grad_norm`"),
    ("clip_range", "`ppo.clip_low` and `ppo.clip_high`"),
    ("cliprange", "`ppo.clip_low` and `ppo.clip_high`"),
    ("epsilon", "`ppo.clip_low` and `ppo.clip_high`"),
    ("init_kl_coef", "`ppo.kl_coef`"),
    ("kl_coef", "`ppo.kl_coef`"),
    ("kl_penalty", "`ppo.kl_coef`"),
    ("model_name_or_path", "`model.policy`"),
    ("ref_model", "`model.reference`"),
    ("reward_model_path", "`reward.models`"),
    ("r", "`lora.rank`"),
    ("lora_r", "`lora.rank`"),
    ("lora_alpha", "`lora.alpha`"),
    ("target_modules", "`lora.targets`"),
    ("save_steps", "`checkpoint.every_steps`"),
    ("save_total_limit", "`checkpoint.keep`"),
    ("eval_steps", "`evaluation.every_steps`"),
];

/// An algorithm as others call it, and what it is here.
pub const ALGORITHMS: &[(&str, &str)] = &[
    ("grpo", "`ppo` with `ppo.advantages = \"grpo\"`"),
    ("dr_grpo", "`ppo` with `ppo.advantages = \"dr_grpo\"` and `ppo.aggregation = \"constant\"`"),
    ("gspo", "`ppo` with `ppo.advantages = \"grpo\"` and `ppo.ratio = \"sequence_mean\"`"),
    ("rloo", "`ppo` with `ppo.advantages = \"rloo\"`"),
    ("reinforce", "`ppo` with `ppo.advantages = \"rloo\"`"),
    ("rlhf", "`ppo`"),
    ("ipo", "`dpo` or `online_dpo` with `loss.kind = \"ipo\"`"),
    ("slic", "`dpo` or `online_dpo` with `loss.kind = \"hinge\"`"),
    ("rpo", "`dpo` or `online_dpo` with `loss.sft_weight`"),
    ("oaif", "`online_dpo` with `[judge]`"),
    ("rm", "`reward_model`"),
    ("reward", "`reward_model`"),
    ("finetune", "`sft`"),
    ("raft", "`iterative_dpo` is the nearest"),
];

/// `; here it is ...` of a word, or nothing.
pub fn hint(words: &[(&str, &str)], word: &str) -> String {
    let found = words.iter().find(|(theirs, _)| theirs.eq_ignore_ascii_case(word));
    found.map_or(String::new(), |(_, here)| format!("; here it is {here}"))
}
