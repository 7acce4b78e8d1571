// Every kernel, in the order of use. Included by isa/<name>.cpp after its Vec.
#include "cpu/kernels/tiles.inl"

#include "cpu/kernels/operands.inl"

#include "cpu/kernels/combination.inl"
#include "cpu/kernels/dropout.inl"
#include "cpu/kernels/expand.inl"
#include "cpu/kernels/importance.inl"
#include "cpu/kernels/outer.inl"
#include "cpu/kernels/roofline.inl"
#include "cpu/kernels/row_dot.inl"
#include "cpu/kernels/shrink.inl"
