"""How blocks of threads meet: through the shared memory of a cluster, and through device memory; beside `_mosaic_gpu`.

Words of device code, to be called inside `plgpu.inline_mgpu`.
"""

from jaxsparse.ops import _mosaic_gpu as mg

ir, arith, llvm = mg.ir, mg.arith, mg.llvm


def cluster_rank():
  """Index of this block of threads in its cluster, i32."""
  return mg.inline_ptx("mov.u32 $0, %cluster_ctarank;", [], "=r", ir.IntegerType.get_signless(32))


def cluster_barrier():
  """All threads of the cluster have come here or left, and see what the others wrote to shared memory before."""
  mg.inline_ptx("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;", [], "~{memory}")


def send_f32x4(address, member: int, values, stride: int):
  """Stores f32 by fours to another block of the cluster, `stride` bytes apart, from where `address` is here (i32) on."""
  i32 = ir.IntegerType.get_signless(32)
  remote = mg.inline_ptx(f"mapa.shared::cluster.u32 $0, $1, {member};", [address], "=r,r", i32)
  for i in range(0, len(values), 4):
    ptx = f"st.shared::cluster.v4.f32 [$0 + {i // 4 * stride}], {{$1, $2, $3, $4}};"
    mg.inline_ptx(ptx, [remote, *values[i : i + 4]], "r,f,f,f,f,~{memory}")


def load_shared_f32x4(address, offset: int, count: int, stride: int):
  """Loads `count` times four f32 from shared memory, `stride` bytes apart."""
  f32, found = ir.F32Type.get(), []
  for i in range(count):
    ptx = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset + i * stride}];"
    result = mg.inline_ptx(ptx, [address], "=f,=f,=f,=f,r,~{memory}", llvm.StructType.get_literal([f32] * 4))
    found += [llvm.extractvalue(f32, result, [j]) for j in range(4)]
  return found


def store_global_f32x4(address, offset: int, values):
  """Stores four f32 to device memory, 16 bytes."""
  mg.inline_ptx(f"st.global.v4.f32 [$0 + {offset}], {{$1, $2, $3, $4}};", [address, *values], "l,f,f,f,f")


def load_global_f32x4(address, offset: int):
  """Loads four f32 from device memory past the L1 cache, which may hold what was there before."""
  f32 = ir.F32Type.get()
  ptx = f"ld.global.cg.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"
  result = mg.inline_ptx(ptx, [address], "=f,=f,=f,=f,l", llvm.StructType.get_literal([f32] * 4))
  return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def add_from_global(sums, address, at_once: int):
  """An f32 accumulator plus what `load_global_f32x4` finds at an address of this thread, four sums every 16 * 128 bytes.

  `at_once` loads are in flight at a time.
  """
  registers, values = list(sums.registers.flat), []
  for start in range(0, len(registers), 2 * at_once):
    group = registers[start : start + 2 * at_once]
    fours = [load_global_f32x4(address, (start // 2 + i) * 16 * mg.WARPGROUP) for i in range(len(group) // 2)]
    more = [value for four in fours for value in four]
    values += [arith.addf(mg.extract(group[i // 2], i % 2), more[i]) for i in range(len(more))]
  return mg.accumulator(values, sums.shape)


def signal(flag, predicate):
  """Adds 1 to an i32 in device memory, after all that this thread knows to be written or read there.

  Args:
    flag: byte address, i64.
    predicate: i1, which thread.
  """
  told = arith.extui(ir.IntegerType.get_signless(32), predicate)
  add = "setp.ne.u32 p, $1, 0; @p red.release.gpu.global.add.u32 [$0], 1;"
  mg.inline_ptx("{ .reg .pred p; " + add + " }", [flag, told], "l,r")


def await_signal(flag, value):
  """Waits until an i32 at a byte address (i64) in device memory, which only grows, is `value`."""
  loop = "WAIT: ld.acquire.gpu.global.u32 v, [$0]; setp.lt.u32 p, v, $1; @p bra WAIT;"
  mg.inline_ptx("{ .reg .pred p; .reg .u32 v; " + loop + " }", [flag, value], "l,r")


def comes_second(flag, value):
  """Whether another warpgroup was here before this one, as an i32 that its threads agree on; they meet.

  Waits until an i32 at a byte address (i64) in device memory is `value`, and adds 1: who comes next finds more than that.
  """
  told = arith.extui(ir.IntegerType.get_signless(32), mg.is_thread(0))
  barrier = arith.addi(arith.shrui(mg.thread_index(), mg.const32(7)), mg.const32(1))  # that of `warpgroup_barrier`
  ptx = (
    "{ .reg .pred one, more, any; .reg .u32 v; setp.eq.u32 one, $3, 0; mov.u32 v, $2; @one bra MET; "
    "WAIT: ld.acquire.gpu.global.u32 v, [$1]; setp.lt.u32 more, v, $2; @more bra WAIT; "
    "atom.acq_rel.gpu.global.add.u32 v, [$1], 1; "
    "MET: bar.warp.sync 0xffffffff; setp.ne.u32 more, v, $2; "
    f"barrier.cta.red.or.pred any, $4, {mg.WARPGROUP}, more; selp.u32 $0, 1, 0, any; }}"
  )
  return mg.inline_ptx(ptx, [flag, value, told, barrier], "=r,l,r,r,r", ir.IntegerType.get_signless(32))


def fetch_add(counter, place, predicate, cluster: int = 1):
  """One thread adds 1 to an i32 in device memory and stores what was there before to shared memory; nobody waits for it.

  Args:
    counter: byte address in device memory, i64.
    place: byte address in shared memory, i32.
    predicate: i1, which thread.
    cluster: blocks of a cluster; the first of them fetches for all, each of which gets it at its `place`.
  """
  flag = arith.extui(ir.IntegerType.get_signless(32), predicate)
  fetch = "@p atom.global.add.u32 v, [$0], 1; "
  if cluster == 1:
    ptx = "setp.ne.u32 p, $2, 0; " + fetch + "@p st.shared.u32 [$1], v; "
  else:
    ptx = "mov.u32 a, %cluster_ctarank; setp.eq.u32 p, a, 0; setp.ne.and.u32 p, $2, 0, p; " + fetch
    for member in range(cluster):
      ptx += f"@p mapa.shared::cluster.u32 a, $1, {member}; @p st.shared::cluster.u32 [a], v; "
    ptx += "fence.acq_rel.cluster; "
  mg.inline_ptx("{ .reg .pred p; .reg .u32 v, a; " + ptx + "}", [counter, place, flag], "l,r,r")
