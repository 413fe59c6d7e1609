// `node build.mjs` makes dist/, which is what is published: each entry as an ES module and for `require`.
// `node build.mjs types` adds the types of the latter, once tsc has written those of the former.
// `node build.mjs vendor` makes the copy that the pages of an instance use; `node build.mjs test` makes build/.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const common = { bundle: true, format: "esm", target: "es2022", logLevel: "warning" };
const { name, version, license } = JSON.parse(readFileSync("package.json", "utf8"));

// The hook's file imports the client's, instead of holding it once more.
const keepApart = (extension) => ({
  name: "keep-apart",
  setup: ({ onResolve }) =>
    onResolve({ filter: /^\.\/index\.js$/ }, () => ({ path: `./index${extension}`, external: true })),
});

const kind = process.argv[2];
if (kind === "test") {
  await build({ ...common, entryPoints: ["test/core.test.ts"], outdir: "build", platform: "node" });
} else if (kind === "vendor") {
  await build({
    ...common,
    entryPoints: ["src/index.ts"],
    outdir: process.argv[3] ?? "../../src/pokebridge/console/static/vendor/pokebridge-client",
    minify: true,
    banner: { js: `/*! ${name} ${version}, ${license}. Built from clients/js by \`npm run vendor\`. */` },
  });
} else if (kind === "types") {
  for (const name of readdirSync("dist").filter((name) => name.endsWith(".d.ts"))) {
    const types = readFileSync(`dist/${name}`, "utf8").replace(/(["']\.\/\w+)\.js(["'])/g, "$1.cjs$2");
    writeFileSync(`dist/${name.replace(".d.ts", ".d.cts")}`, types);
  }
} else {
  for (const [format, extension] of [["esm", ".js"], ["cjs", ".cjs"]]) {
    const options = { format, outExtension: { ".js": extension }, plugins: [keepApart(extension)] };
    const published = { ...common, ...options, outdir: "dist", minify: true, sourcemap: true };
    await build({ ...published, entryPoints: ["src/index.ts", "src/server.ts"] });
    await build({
      ...published,
      entryPoints: ["src/react.ts"],
      external: ["react"],
      banner: { js: '"use client";' }, // for frameworks that render on the server first
    });
  }
}
