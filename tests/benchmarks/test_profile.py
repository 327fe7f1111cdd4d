"""Where the time of a step goes: kernels by their names, and curves of losses beside each other."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.tools import profile
from benchmarks.tools.timeline import kernels as profile_kernels
from benchmarks.tools.timeline import timeline

KERNELS = {
    "matrix products": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN",
        "nvjet_hsh_192x192_64x4_2x1_v_bz_coopB_bias_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__...",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(...::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>(cublasLt::cublasS...",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>(...)",
        "triton_tem_fused_addmm_view_7",
        "aten::addmm",
    ],
    "convolutions": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x256x64_warpgroupsize2x1x1_g1_ker...",
        "sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_kernel__5x_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128_32x4_nhwc_align8>(...)",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, c10::BFloat16, int>(...)",
        "void at::native::(anonymous namespace)::conv_depthwise2d_grad_weight_kernel<c10::BFloat16, unsigned int>(...)",
        "triton_tem_fused_convolution_3",
        "aten::convolution_backward",
    ],
    "attention": [
        "short_attention_kernel",
        "short_attention_backward_kernel",
        "engine::short_attention",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16...",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128, 128, 8, 4, ...",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64, 128, 128, 8>>(...)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_128x128x64_1x1x1_cga1x1x1_kernel0_0",
        "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<...>::Params)",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*, void*, void*, unsigned int...",
        "void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, c10::BFloat16, float, 7, false, false>(...)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "norms": [
        "group_norm_silu_kernel",
        "group_norm_silu_backward_kernel",
        "triton_red_fused_native_group_norm_silu_12",
        "triton_per_fused__to_copy_add_native_layer_norm_native_layer_norm_backward_4",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>(...)",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16, float, int>(...)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::GroupNormKernelImplInter...",
        "engine::group_norm_silu",
        "gelu_norms_kernel",
        "gelu_response_sums_kernel",
        "engine::gelu_response_norm",
    ],
    "pointwise": [
        "triton_poi_fused_add_convolution_silu_31",
        "triton_red_fused_convolution_backward_sum_8",
        "triton_poi_fused__scaled_dot_product_flash_attention_add_5",
        "triton_poi_fused__to_copy_gelu_mul_9",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char...",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<...>, unsigned int, fl...",
        "void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::BFloat16, ...>(...)",
        "void at::native::(anonymous namespace)::avg_pool2d_out_cuda_frame_nhwc<c10::BFloat16, float>(int, c10::BFlo...",
        "void at::native::bitonicSortKVInPlace<-2, -1, 16, 16, long, long, at::native::GTOp<long, true>, unsigned int>(...",
        "add_noise_kernel",
        "diffusion_loss_kernel",
        "gelu_kernel",
        "gelu_backward_kernel",
        "engine::gelu",
    ],
    "copies": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "memcpy32_post",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{l...",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<...>(...)",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true, (cudnnKernelDataType_t)0>(...)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>(...)",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float, f...",
        "triton_poi_fused__to_copy_clone_permute_17",
        "triton_poi_fused_cat_3",
    ],
    "optimizer": [
        "adamw_ema_kernel",
        "square_sum_kernel",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, true, float>(float const*, at::native::Te...",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedA...",
        "engine::adamw_ema_",
    ],
    "other": ["a_kernel_that_nobody_knows"],
}  # fmt: skip


@pytest.mark.parametrize("category", KERNELS)
def test_kernels_have_their_category_by_name(category):
    assert {name: profile.category(name) for name in KERNELS[category]} == dict.fromkeys(KERNELS[category], category)


def test_every_kernel_of_ours_is_known():
    sources = [path.read_text() for path in Path("engine/kernels").glob("*.py")]
    names = [name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)]
    assert len(names) >= 6
    assert "other" not in {profile.category(name) for name in names}


def test_overlapping_kernels_share_their_time_and_the_rest_is_idle():
    def event(name, start, end, kind=torch.autograd.DeviceType.CUDA, annotation=False):
        nanoseconds = {"start_ns": 1000 * start, "end_ns": 1000 * end, "duration_ns": 1000 * (end - start)}
        given = {"name": name, "device_type": kind, "is_user_annotation": annotation, **nanoseconds}
        return SimpleNamespace(**{key: lambda value=value: value for key, value in given.items()})

    events = [event("nvjet_a", 0, 100), event("Memset (Device)", 50, 100), event("adamw_ema_kernel", 150, 200),
              event("## Call CompiledFxGraph", 0, 200, annotation=True),
              event("cudaGraphLaunch", 0, 300, torch.autograd.DeviceType.CPU)]  # fmt: skip
    results = SimpleNamespace(events=lambda: events)
    found = profile_kernels(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)))
    row = profile.summarize(*timeline(found), steps=1)
    assert row["step_milliseconds"] == pytest.approx(0.2)
    assert row["milliseconds"]["idle"] == pytest.approx(0.05)
    assert row["longest_gap_milliseconds"] == pytest.approx(0.05)
    assert sum(row["milliseconds"].values()) == pytest.approx(0.2)
    assert row["milliseconds"]["matrix products"] == pytest.approx(0.075)
    assert row["kernels_per_step"] == 3
