// node tint.cjs FOLDER: compiles what examples/dump_shaders.rs wrote with Tint and makes every pipeline.
const { create, globals } = require('webgpu');
const fs = require('node:fs');
Object.assign(globalThis, globals);

async function main(folder) {
  // Kept: what Dawn made dies with it, and nothing here refers to it once there is a device.
  const gpu = globalThis.gpu = create(['backend=null']);
  const adapter = await gpu.requestAdapter();
  const limits = {};
  for (const name of ['maxComputeInvocationsPerWorkgroup', 'maxComputeWorkgroupSizeX',
    'maxComputeWorkgroupStorageSize', 'maxStorageBuffersPerShaderStage']) limits[name] = adapter.limits[name];
  const device = await adapter.requestDevice({ requiredFeatures: ['subgroups', 'shader-f16'], requiredLimits: limits });

  const refusals = [];
  let modules = 0, pipelines = 0, large = 0, unknown = 0, module, last;
  for (const line of fs.readFileSync(`${folder}/index.jsonl`, 'utf8').trim().split('\n')) {
    const { file, entry, constants, subgroups, matrices, workgroup_bytes, output } = JSON.parse(line);
    // Cooperative matrices are an extension of naga's.
    if (matrices) {
      unknown++;
      continue;
    }
    if (file !== last) {
      last = file;
      modules++;
      // naga takes subgroup operations without the directive, and does not know it.
      const code = (subgroups ? 'enable subgroups; ' : '') + fs.readFileSync(`${folder}/wgsl/${file}.wgsl`, 'utf8');
      device.pushErrorScope('validation');
      module = device.createShaderModule({ code });
      const { messages } = await module.getCompilationInfo();
      await device.popErrorScope();
      const errors = messages.filter(m => m.type === 'error');
      if (errors.length) module = null;
      for (const m of errors) refusals.push(`${file}.wgsl:${m.lineNum}:${m.linePos}: ${m.message}`);
    }
    if (!module) continue;
    // This device has as much as every adapter has; some tiles are for those that have more.
    if (workgroup_bytes > limits.maxComputeWorkgroupStorageSize) {
      large++;
      continue;
    }
    pipelines++;
    try {
      await device.createComputePipelineAsync({ layout: 'auto', compute: { module, entryPoint: entry, constants } });
    } catch (error) {
      refusals.push(`${output}: ${error.message}`);
    }
  }
  for (const refusal of refusals) console.log(refusal.trim());
  console.log(`Tint: ${modules} modules, ${pipelines} pipelines, ${refusals.length} refusals; `
    + `not made: ${large} pipelines of compiled modules, for adapters with more than ${limits.maxComputeWorkgroupStorageSize} bytes of workgroup memory; `
    + `not given to it: ${unknown} pipelines with cooperative matrices, which it does not know`);
  // Dawn keeps a process alive.
  process.exit(modules === 0 || refusals.length ? 1 : 0);
}

main(process.argv[2]).catch(error => {
  console.error(error);
  process.exit(1);
});
